"""Every validation reads the same tokens; steps and validations without counted tokens are reported."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_job
from fork_server import ForkServer
from prepared import write_prepared

from megatron_qad.engine.run_directory import json_records

VOCAB = tiny_job.LLAMA["vocab_size"]
# The weights do not change, so that all validations measure the same model. Unquantized, because amaxes depend on the
# training data.
FIXED = ["--lr", "0", "--min-lr", "0", "--qad-policy", "bf16"]


def write_data(prefix: Path, masks: list, vocab_size: int = VOCAB) -> None:
    rng = np.random.default_rng(0)
    write_prepared(prefix, [rng.integers(0, vocab_size, size=len(mask)) for mask in masks], masks)


class Shop:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self._server = directory, server

    def run(self, *flags: str, nproc: int = 1, num_steps: int = 4, data: str = "data", **more) -> str:
        """Run a job that validates every second step, and return its output."""
        d = self.directory
        argv = [
            *("--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student", "--data-path", f"{d}/{data}"),
            *("--data-cache-path", f"{d}/cache", "--split", "80,20,0", "--seq-length", "32"),
            *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", str(num_steps)),
            *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "constant", "--log-interval", "1"),
            *("--eval-interval", "2", "--save-interval", "2", "--qad-calibration-samples", "8"),
            *(*tiny_job.READ_HERE, *flags),
        ]
        return self._server.run("training_jobs:train", nproc, {"argv": argv}, **more)

    def export_best(self, checkpoint: Path, output: Path, **more) -> str:
        arguments = {"checkpoint": str(checkpoint), "outputs": {"bf16": str(output)}, "iteration": "best"}
        return self._server.run("training_jobs:export_checkpoint", 1, arguments, **more)


@pytest.fixture(scope="module")
def masks() -> list[list[int]]:
    """Loss masks of 60 documents. The first token of each never counts, because the first token of the data and of each
    separate document is not a label."""
    rng = np.random.default_rng(3)
    return [[0, *(rng.random(int(rng.integers(20, 60))) < 0.5).astype(int)] for _ in range(60)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server, masks):
    directory = tmp_path_factory.mktemp("validation")
    for role, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_{role}", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=noise)
    write_data(directory / "data", masks)
    models = [(f"{directory}/hf_{role}", f"{directory}/{role}", "float32") for role in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Shop(directory, server)


def validations(output: str) -> list[str]:
    """Return the text of each validation after its iteration."""
    return re.findall(r"megatron_qad validation at iteration \d+ \| (.*)", output)


def num_tokens(line: str) -> int:
    return int(line.rsplit("num_tokens: ", 1)[1])


@pytest.fixture(scope="module")
def expected(shop, masks) -> str:
    """Text of every validation of the unchanged student, whose run is in ``run``."""
    lines = validations(shop.run(*FIXED, "--save", f"{shop.directory}/run"))
    assert len(lines) == 3 and len(set(lines)) == 1, lines
    assert num_tokens(lines[0]) == sum(map(sum, masks[48:]))
    return lines[0]


def test_every_validation_reads_the_same_tokens(shop, expected):
    """With other seeds, batch sizes and numbers of ranks, with data workers, after a resume, and without training."""
    run = ["--load", f"{shop.directory}/run"]
    for flags, more in (
        (["--seed", "7", "--global-batch-size", "4", "--eval-interval", "3", "--num-workers", "2"], {}),
        (["--eval-global-batch-size", "12"], {"nproc": 2}),
        ([*run, "--global-batch-size", "12", "--override-opt-param-scheduler"], {"num_steps": 6}),
        ([*run, "--skip-train"], {}),
    ):
        lines = validations(shop.run(*FIXED, *flags, **more))
        assert lines and set(lines) == {expected}, flags


def test_other_parallelism_counts_the_same_tokens(shop, expected):
    """Sums are added in another order, so that the last digits of the means may differ."""

    def numbers(line: str) -> list[float]:
        return [float(part.split(": ")[1]) for part in line.split(" | ")]

    for flags, nproc in (
        (["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"], 4),
        (["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"], 2),
    ):
        lines = validations(shop.run(*FIXED, *flags, nproc=nproc, num_steps=2))
        assert len(lines) == 2 and len(set(lines)) == 1
        assert num_tokens(lines[0]) == num_tokens(expected)
        assert numbers(lines[0]) == pytest.approx(numbers(expected), rel=1e-5)


def test_evaluation_that_calibrates_counts_the_same_tokens(shop, expected):
    """Without a training step, calibration reads ahead in the evaluation, even more than its data, and returns the
    microbatches. Uses packed rows."""
    flags = ["--skip-train", "--dataloader-inter-document-masking", "--qad-policy", "nvfp4-all-linear"]
    for samples in ("8", "40"):
        (line,) = validations(shop.run(*flags, "--qad-calibration-samples", samples))
        assert num_tokens(line) == num_tokens(expected)
    trained = validations(shop.run("--qad-ptq", *flags[1:]))
    assert len(set(trained)) == 1 and num_tokens(trained[0]) == num_tokens(expected)


def test_fewer_iterations_read_a_prefix(shop, expected, masks, tmp_path):
    """Validations on a prefix and on the whole set are not ranked together."""
    output = shop.run(*FIXED, "--eval-iters", "1", "--save", str(tmp_path))
    assert "the first 8 of " in output
    lines = validations(output)
    assert len(set(lines)) == 1 and 0 < num_tokens(lines[0]) < num_tokens(expected)
    flags = ["--eval-iters", "50", "--save", str(tmp_path), "--override-opt-param-scheduler"]
    output = shop.run(*FIXED, *flags, num_steps=6)
    num_samples = -(-(sum(map(len, masks[48:])) - 1) // 32)
    assert set(validations(output)) == {expected}
    assert f"--eval-iters 50 becomes {-(-num_samples // 8)}" in output
    assert f"every evaluation reads all {num_samples} validation samples" in output
    assert f"iteration 6 was validated on {num_tokens(expected)} tokens, 2, 4 on {num_tokens(lines[0])}" in output
    listed = json_records.read(tmp_path / "best_checkpoints.json")
    assert [(entry["iteration"], entry["num_tokens"]) for entry in listed] == [(6, num_tokens(expected))]


@pytest.fixture(scope="module")
def mostly_masked(shop) -> str:
    """Data in which only tokens of one training document and of one validation document count."""
    write_data(shop.directory / "masked", [[int(i in (30, 50))] * 40 for i in range(60)])
    return "masked"


def test_step_without_counted_tokens_is_reported(shop, mostly_masked):
    flags = ["--global-batch-size", "2", "--eval-iters", "0"]
    output = shop.run(*flags, data=mostly_masked, fails=True)
    (error,) = {line for line in output.splitlines() if line.startswith("error: ")}
    assert re.match(r"error: step \d+: no token of its batch counts in the loss", error) and "Traceback" not in output
    output = shop.run(*flags, "--qad-on-nan", "skip", data=mostly_masked, num_steps=3)
    skipped = re.findall(r"WARNING: step \d+: no token of its batch counts in the loss.*The step is skipped", output)
    assert len(skipped) == 2 and output.count("skipped updates: 1") == 2


def test_validation_without_counted_tokens_is_not_ranked(shop, mostly_masked, tmp_path):
    flags = ["--global-batch-size", "2", "--eval-iters", "1", "--qad-on-nan", "skip", "--save", str(tmp_path / "run")]
    lines = validations(shop.run(*flags, data=mostly_masked, num_steps=2))
    assert set(lines) == {
        "no token counted | kl_to_teacher: nan | cross_entropy: nan | teacher_cross_entropy: nan | "
        "top1_agreement: nan | num_tokens: 0"
    }
    assert not (tmp_path / "run" / "best_checkpoints.json").exists()
    assert "no checkpoint with a validation" in shop.export_best(tmp_path / "run", tmp_path / "best", fails=True)


def test_split_without_counted_tokens_is_rejected_on_every_rank(shop):
    write_data(shop.directory / "nothing", [[int(i < 48)] * 40 for i in range(60)])
    output = shop.run("--tensor-model-parallel-size", "2", data="nothing", nproc=2, fails=True)
    assert output.count("error: The valid split of ") == 2 and "Traceback" not in output


def test_data_that_the_model_cannot_read_is_rejected_on_every_rank(shop, masks):
    """At TP2 the embedding has 256 rows, so ids of the padding are looked up without an error."""
    parallel = {"nproc": 2, "fails": True}
    write_data(shop.directory / "large", masks, vocab_size=VOCAB + 5)
    output = shop.run("--tensor-model-parallel-size", "2", data="large", **parallel)
    assert output.count(f"large.bin has the token id {VOCAB + 4}, but the model has the ids 0 to {VOCAB - 1}") == 2
    assert "Traceback" not in output
    write_data(shop.directory / "damaged", masks)
    file = shop.directory / "damaged_loss_mask.bin"
    file.write_bytes(bytes(1 - value for value in file.read_bytes()))
    output = shop.run("--data-cache-path", str(file), data="damaged", **parallel)  # nor can the record be written
    assert output.count("damaged_loss_mask.bin is not the file that") == 2 and "Traceback" not in output


def test_every_machine_needs_the_same_data(server, masks, tmp_path):
    machines = {"machine0": dict.fromkeys(("same", "other", "lost"), masks)}
    machines["machine1"] = {"same": masks, "other": masks[:-1]}
    for machine, data in machines.items():
        (tmp_path / machine).mkdir()
        for name, its_masks in data.items():
            write_data(tmp_path / machine / name, its_masks)
    given = {"directory": str(tmp_path), "prefixes": ["same", "other", "lost"]}
    output = server.run("data_jobs:check", 2, given)
    assert output.count("same: whole") == 2
    assert len(re.findall(r"other: other\S* differs between the machines of the job: \d+ bytes on rank 0", output)) == 2
    assert output.count("lost: --data-path lost: lost.bin and lost.idx not found") == 2
