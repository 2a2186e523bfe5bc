"""No process of a job outlives it, whatever ends the launcher, the agent or a rank, and the same command resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_job
import tokenizers
from launch import ROOT, environment
from transformers import PreTrainedTokenizerFast

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 100000 --lr 1e-3 --min-lr 1e-4 --split "
    "80,20,0 --eval-iters 0 --log-interval 1 --qad-calibration-samples 16 --bf16 --use-distributed-optimizer "
    "--save-interval 2 --qad-keep-last 2 --tensor-model-parallel-size 2 --sequence-parallel --num-workers 1"
).split()
SECONDS = 20
"""Limit for all processes to end: 10 on an idle machine, five of which are torchrun's wait; others may be slower."""
SECONDS_TO_SAVE = 60
"""Limit after a stop request: a step, a save and the exit of five interpreters."""
LOST = "The steps since the last checkpoint are lost; run the same command again to resume from it."


@pytest.fixture(scope="module")
def place(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("processes")
    tiny_job.write_hf(directory / "hf", tiny_job.LLAMA)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf", f"{directory}/teacher", "bfloat16")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return directory


def wait_for(condition, seconds: float, log: Path):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-5000:]
        time.sleep(0.1)


def default_sigint():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    def is_alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it ended between the two
            return False

    return [process for process in processes if is_alive(process)]


# Each case resumes the run of the previous one: target of the signal, signal, expected line on the lost steps.
CASES = [
    ("launcher", signal.SIGINT, f"torchrun.sh: ended by signal 2. {LOST}"),
    ("launcher", signal.SIGKILL, f"torchrun.sh has ended, and all ranks end with it. {LOST}"),
    ("agent", signal.SIGTERM, None),
    ("agent", signal.SIGKILL, f"torchrun.sh: ended by signal 9. {LOST}"),
    ("rank", signal.SIGKILL, None),
]
MORE_CASES = [  # tests/dist/test_preemption.py sends SIGTERM to all processes, and to a rank
    ("launcher", signal.SIGTERM, None),
    ("agent", signal.SIGINT, f"torchrun.sh: ended by signal 2. {LOST}"),
    ("rank", signal.SIGINT, None),
    ("rank", signal.SIGTERM, None),
]
SLOW_CASES = [pytest.param(*case, marks=pytest.mark.all) for case in MORE_CASES]


@pytest.mark.parametrize(
    "role, signum, message",
    [*CASES, *SLOW_CASES],
    ids=[f"{signum.name} to the {role}" for role, signum, _ in [*CASES, *MORE_CASES]],
)
def test_no_process_is_left(place, tmp_path, role, signum, message):
    run, log = place / "run", tmp_path / "log"
    resumes = run.is_dir()
    command = [f"{ROOT}/launch/torchrun.sh", "pretrain_qad.py", "--qad-teacher", f"{place}/teacher", *FLAGS]
    command += ["--data-path", f"{place}/data", "--data-cache-path", f"{place}/cache", "--save", str(run)]
    with open(log, "w") as output:
        env = environment() | {"NPROC_PER_NODE": "2"}
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
        # As a job of an interactive shell: in its own process group, which receives Ctrl-C as a whole. If the parent of
        # the tests ignores SIGINT, a script could not trap it, so its default is restored.
        job = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=default_sigint)
        launcher = psutil.Process(job.pid)
        try:
            wait_for(lambda: log.read_text().count("saved iteration") >= 2, 120, log)
            agent = next(p for p in launcher.children() if "agent.py" in " ".join(p.cmdline()))
            ranks = [p for p in agent.children() if "pretrain_qad.py" in " ".join(p.cmdline())]
            processes = [launcher, *launcher.children(recursive=True)]
            assert len(ranks) == 2 and len(processes) >= 5, processes  # the first rank has a data worker
            target = {"launcher": launcher, "agent": agent, "rank": ranks[1]}[role]
            if (role, signum) == ("launcher", signal.SIGINT):
                os.killpg(job.pid, signum)
            else:
                target.send_signal(signum)
            start = time.monotonic()
            end = start + (SECONDS_TO_SAVE if signum == signal.SIGTERM else SECONDS)
            while left := alive(processes):
                assert time.monotonic() < end, (left, log.read_text()[-3000:])
                time.sleep(0.05)
            print(f"{signum.name} to the {role}: all processes ended after {time.monotonic() - start:.1f} s")
        finally:
            for process in alive([launcher, *launcher.children(recursive=True)] if launcher.is_running() else []):
                process.kill()
    job.wait(5)  # a zombie until now
    text = log.read_text()
    if message is not None:
        assert [line for line in text.splitlines() if LOST in line] == [message], text[-3000:]
        assert "Traceback" not in text
    if signum == signal.SIGTERM:
        assert job.returncode == 0 and "asked to stop; saving after this step" in text
    else:
        assert job.returncode != 0
    assert ("resuming    from iteration" in text) == resumes, text[-3000:]


def test_tokenizing_workers_end_with_their_parent(tmp_path):
    """Their shared semaphores are removed, too, and the next preparation of the output removes incomplete files."""
    source = tmp_path / "text.txt"
    source.write_text("one two three\n\n" * 300_000)
    command = [sys.executable, "tools/prepare_data.py", "--input", str(source), "--split-on", "blank"]
    command += ["--tokenizer", str(write_tokenizer(tmp_path)), "--output", str(tmp_path / "out")]
    log = tmp_path / "log"
    with open(log, "w") as output:
        job = subprocess.Popen([*command, "--workers", "2"], cwd=ROOT, env=environment(), stdout=output, stderr=output)
    main = psutil.Process(job.pid)
    wait_for(lambda: job.poll() is not None or list(tmp_path.glob("out.incomplete-*.bin")), 60, log)
    wait_for(lambda: job.poll() is not None or len(main.children()) >= 3, 60, log)  # and a tracker
    processes = [main, *main.children(recursive=True)]
    maps = [line.split() for line in Path(f"/proc/{main.pid}/maps").read_text().splitlines() if "/dev/shm/" in line]
    inodes = {int(inode) for _, _, _, _, inode, *_ in maps}  # the names in maps are glibc's temporary ones
    semaphores = [Path(entry.path) for entry in os.scandir("/dev/shm") if entry.inode() in inodes]
    assert semaphores
    job.kill()
    job.wait()
    wait_for(lambda: not alive(processes) and not any(path.exists() for path in semaphores), SECONDS, log)
    source.write_text("one two three\n\n" * 10)
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert {path.name for path in tmp_path.glob("out*")} == {"out.bin", "out.idx", "out.json"}


def write_tokenizer(directory: Path) -> Path:
    """Save a word-level tokenizer in Hugging Face's format and return its directory."""
    words = {word: i for i, word in enumerate(("<unk>", "<eos>", "one", "two", "three"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(directory / "tokenizer")
    return directory / "tokenizer"
