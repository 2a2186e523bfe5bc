"""A read-only output or a full disk ends every program with one error and leaves no output that looks complete."""

import subprocess

import pytest
import tiny_job
import tokenizers
from fork_server import ForkServer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MOUNTS = 'mount -t tmpfs -o ro none {d}/readonly && exec "$@"'
MOUNT = "umount {d}/full; mount -t tmpfs -o size={size} none {d}/full"
JOB = (
    "--qad-teacher {d}/teacher --data-path {d}/good/prepare --data-cache-path {d}/cache --split 80,20,0 "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 2 --bf16 --train-iters 2 --lr 1e-3 --eval-interval 2 "
    "--eval-iters 1 --log-interval 1 --qad-calibration-samples 2 --save-interval 2 --num-workers 0"
)
PROGRAMS = {
    "import": "tools/import_hf.py --hf-model {d}/hf --output {out}/import",
    "prepare": "tools/prepare_data.py --input {d}/text.txt --split-on blank --tokenizer {d}/hf --output {out}/prepare",
    "generate": "tools/generate_data.py --model {d}/hf --num-documents 4 --max-new-tokens 4 --output {out}/generate",
    "qad": "pretrain_qad.py --save {out}/qad --tensorboard-dir {out}/qad/tensorboard " + JOB,
    "ptq": "pretrain_qad.py --save {out}/ptq --qad-ptq " + JOB,
    "export": "tools/export_hf.py --checkpoint {d}/run --output {out}/export --layout modelopt",
    "report": "tools/report.py --run QAD={d}/run --teacher {d}/teacher --output {out}/report",
    "sensitivity": "tools/sensitivity.py --output {out}/sensitivity --num-microbatches 1 " + JOB,
    "smooth": "tools/smooth.py --output {out}/smooth " + JOB,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """``run(program, disk, fails)``: output of a program that writes to a disk that only its processes see."""
    directory = tmp_path_factory.mktemp("shop")
    for disk in ("readonly", "full", "good"):
        (directory / disk).mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", MOUNTS.format(d=directory), "sh"]
    trial = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"a file system cannot be mounted here: {trial.stderr.strip()}")
    write_inputs(directory)
    with ForkServer(directory, prefix) as server:

        def run(program: str, disk: str, fails: bool = True) -> str:
            path, *argv = PROGRAMS[program].format(d=directory, out=directory / disk).split()
            return server.run("script_jobs:script", 1, {"path": path, "argv": argv}, fails=fails)

        models = [(f"{directory}/hf", f"{directory}/teacher", "bfloat16")]
        server.run("training_jobs:import_checkpoints", 1, {"models": models})
        run("prepare", "good", fails=False)
        run("qad", "good", fails=False)
        (directory / "good" / "qad").rename(directory / "run")
        run.server, run.directory = server, directory
        yield run


def write_inputs(directory) -> None:
    LlamaForCausalLM(LlamaConfig(**tiny_job.LLAMA)).save_pretrained(directory / "hf")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(117))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(directory / "hf")
    (directory / "text.txt").write_text(("w1 w2 w3 w4 w5 " * 8 + "\n\n") * 1000)


def refused(shop, program: str, disk: str) -> str:
    """Return the only error of a program."""
    output = shop(program, disk)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    return errors[0]


LOCKS_FIRST = [pytest.param(name, marks=pytest.mark.all) for name in ("import", "prepare", "generate", "smooth", "ptq")]


@pytest.mark.parametrize("program", ["qad", "export", "report", "sensitivity", *LOCKS_FIRST])
def test_read_only_output(shop, program):
    assert "/readonly/" in (error := refused(shop, program, "readonly")) and "cannot be written (Read-only" in error


# The disks hold the lock, or all files but the last ones; "qad" fills up in its start, and in its last save.
FULL = [("prepare", "80k"), ("generate", "8k"), ("qad", "8k"), ("export", "80k"), ("report", "80k"), ("smooth", "4m")]
FULL += [("sensitivity", "16k")]
MORE = [("import", "4m"), ("prepare", "8k"), ("qad", "40k"), ("qad", "17m"), ("ptq", "1m"), ("export", "8k")]
MORE += [("report", "8k"), ("report", "40k"), ("sensitivity", "8k"), ("smooth", "40k")]


@pytest.mark.parametrize("program, size", [*FULL, *(pytest.param(*case, marks=pytest.mark.all) for case in MORE)])
def test_full_disk(shop, program, size):
    shop.server.run("os:system", 1, {"command": MOUNT.format(d=shop.directory, size=size)})
    assert f"{shop.directory}/full/{program}" in (error := refused(shop, program, "full"))
    full = ("No space left on device", "the disk is full or a quota is reached", "(disk: 0 MB were free then)")
    assert any(text in error for text in full), error
    shop.server.run("os:system", 1, {"command": f"find {shop.directory}/full >{shop.directory}/listing"})
    left = (shop.directory / "listing").read_text()
    assert not any(text in left for text in (".partial", ".incomplete", ".new", "release", "iter_", ".lock\n.")), left
