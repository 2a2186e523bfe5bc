"""Of two jobs or tools with the same output, the second is refused and the first continues."""

import subprocess
import sys
import time

import psutil
import pytest
import tiny_job
from launch import ROOT, environment


def error_of(output: str) -> str:
    assert "Traceback" not in output, output[-3000:]
    return next(line for line in output.splitlines() if line.startswith("error: "))


@pytest.fixture
def waiting():
    """``waiting(code)``: start a process that executes the code, which may use ``locks``, and then waits."""
    started = []

    def start(call: str) -> psutil.Process:
        code = f"import time\nfrom megatron_qad.engine.run_directory import locks\n{call}\n"
        code += "print('held', flush=True)\ntime.sleep(300)"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
        )
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_second_job_is_refused(tmp_path, server):
    """Two real jobs; the second starts while the first trains."""
    tiny_job.write_hf(tmp_path / "hf", tiny_job.LLAMA)
    tiny_job.write_data(tmp_path / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    run, log = tmp_path / "run", tmp_path / "log"
    flags = (
        "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 100000 --lr 1e-3 --eval-iters 0 "
        "--bf16 --split 80,20,0 --log-interval 1 --save-interval 2 --qad-keep-last 1 --qad-calibration-samples 4"
    ).split()
    argv = ["--qad-teacher", f"{tmp_path}/teacher", "--data-path", f"{tmp_path}/data", "--save", str(run), *flags]
    argv += tiny_job.READ_HERE
    models = [(f"{tmp_path}/hf", f"{tmp_path}/teacher", "bfloat16")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "pretrain_qad.py", *argv]
    with open(log, "w") as output:
        first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while "saved iteration" not in log.read_text():
            assert first.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
        for nproc in (1, 2):
            arguments = {"argv": [*argv, "--tensorboard-dir", str(run / "events")]}
            error = error_of(server.run("training_jobs:train", nproc, arguments, fails=True))
            assert f"--save {run}: is in use by process " in error and "pretrain_qad.py" in error
        assert not (run / "events").exists()
        saved = log.read_text().count("saved iteration")
        while log.read_text().count("saved iteration") < saved + 2:
            assert first.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
    finally:
        for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            process.kill()
        first.wait()


@pytest.mark.parametrize(
    "tool, output, flags",
    [
        ("import_hf", "out", ["--hf-model", "{d}/hf"]),
        ("prepare_data", "out", ["--input", "{d}/text.txt", "--tokenizer", "{d}/tokenizer"]),
    ],
)
def test_second_tool_is_refused(tmp_path, waiting, server, tool, output, flags):
    """A process that holds the lock replaces the first tool."""
    from test_processes import write_tokenizer

    tiny_job.write_hf(tmp_path / "hf", tiny_job.LLAMA)
    (tmp_path / "text.txt").write_text("one two three")
    write_tokenizer(tmp_path)
    first = waiting(f"lock = locks.lock_output({str(tmp_path / output)!r})\nlock.__enter__()")
    argv = [*(flag.format(d=tmp_path) for flag in flags), "--output", str(tmp_path / output)]
    log = server.run("script_jobs:script", 1, {"path": f"tools/{tool}.py", "argv": argv}, fails=True)
    assert f"--output {tmp_path / output}: is in use by process {first.pid} on " in error_of(log)
    assert not list(tmp_path.glob(f"{output}*"))
