"""What a job prints: its own lines on the terminal, everything of other packages in files of the run directory.

The number of lines before the first iteration is checked with the script itself (test_training.test_command_line).
"""

import re
from pathlib import Path

import pytest
import tiny_job
from fork_server import ForkServer

from megatron_qad.models.families import family_of
from megatron_qad.models.flops import forward_flops
from megatron_qad.report.scalars import read_scalars

NUM_STEPS, SEQ_LENGTH, BATCH = 8, 32, 8
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| iteration (?P<step>\d+)/8 \| kl loss: (?P<loss>\S+) \| grad norm: \S+ \| "
    r"lr: (?P<lr>\S+) \| (?P<tokens>[\d,]+) tokens/s \| TFLOP/s per rank: student (?P<student>\S+), teacher "
    r"(?P<teacher>\S+) \| peak memory: (?P<memory>\S+) GB \| left: (?P<left>\d:\d\d:\d\d)"
)


class Shop:
    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server

    def run(self, *flags: str, function: str = "speak", nproc: int = 2, **more) -> str:
        d = self.directory
        argv = [
            *("--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student", "--data-path", f"{d}/data"),
            *("--data-cache-path", f"{d}/cache", "--split", "80,20,0", "--seq-length", str(SEQ_LENGTH)),
            *("--micro-batch-size", "2", "--global-batch-size", str(BATCH), "--train-iters", str(NUM_STEPS)),
            *("--lr", "1e-3", "--min-lr", "1e-4", "--log-interval", "1", "--eval-interval", "2", "--eval-iters", "1"),
            *("--save-interval", "2", "--qad-calibration-samples", "8", *tiny_job.READ_HERE, *flags),
        ]
        return self.server.run(f"log_jobs:{function}", nproc, {"argv": argv}, **more)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("log")
    for role, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_{role}", tiny_job.LLAMA, noise=noise)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf_{role}", f"{directory}/{role}", "float32") for role in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Shop(directory, server)


@pytest.fixture(scope="module")
def finished(shop) -> tuple[Path, list[str]]:
    """The run directory of a finished job, and the lines of its ranks, rank after rank."""
    run = shop.directory / "run"
    output = shop.run("--save", str(run), "--tensorboard-dir", f"{run}/tensorboard", "--qad-keep-last", "1")
    return run, output.splitlines()


def test_one_line_per_step(finished):
    run, lines = finished
    steps = [match for line in lines if (match := LINE.fullmatch(line))]
    assert [int(step["step"]) for step in steps] == list(range(1, NUM_STEPS + 1))
    assert steps[-1]["left"] == "0:00:00" and steps[-1]["lr"] == "0.0001"
    curves = read_scalars(run)
    logged = dict(curves["kl loss"])
    for step in steps:
        assert float(step["loss"]) == pytest.approx(logged[int(step["step"])], rel=1e-5)  # six digits are printed
    model = forward_flops(family_of(tiny_job.LLAMA), tiny_job.LLAMA)
    per_token = model.of([SEQ_LENGTH]) / SEQ_LENGTH
    for name, passes in (("student", 3), ("teacher", 1)):
        for (_, tflops), (_, tokens) in zip(
            curves[f"speed/{name}_tflops_per_rank"], curves["speed/tokens_per_second"], strict=True
        ):
            # Event files hold float32.
            assert tflops * 1e12 * 2 == pytest.approx(passes * per_token * tokens, rel=1e-6)
    assert "speed/mfu" not in curves and all(0.05 < gigabytes < 64 for _, gigabytes in curves["memory/peak_gb"])


def test_terminal_shows_the_job_only(finished):
    _, lines = finished
    own = ("megatron_qad: ", " megatron_qad validation at iteration ", "[rank")
    shown = [line for line in lines if line and not line.startswith(own) and not LINE.fullmatch(line)]
    by_callback = [line for line in shown if "the callback" in line]
    assert by_callback.count("the callback prints") == 2 and sum("callback warns" in line for line in by_callback) >= 2
    assert [line for line in shown if line not in by_callback and "warnings.warn(" not in line] == []
    assert sum(line.startswith("megatron_qad: ") for line in lines) < 40


def test_files_hold_the_rest(finished):
    run, _ = finished
    first, last = ((run / name).read_text() for name in ("megatron.log", "megatron.rank1.log"))
    assert "---- arguments ----" in first and "INFO:megatron.core" in first and "datetime:" in first
    assert "iteration        8/       8 | consumed samples:" in last and "megatron_qad step times" in last
    assert "the callback" not in first + last


def test_saved_removed_and_best_are_said(finished):
    _, lines = finished
    said = [line.removeprefix("megatron_qad: ") for line in lines]
    assert [line.split(" in ")[0] for line in said if line.startswith("saved")] == [
        f"saved iteration {i}" for i in (2, 4, 6, 8)
    ]
    removed = [line for line in said if line.startswith("removed")]
    assert removed == [f"removed iteration {i} (keeps the last 1)" for i in (2, 4, 6)]
    kls = [float(re.search(r"kl_to_teacher: (\S+)", line)[1]) for line in lines if "validation at" in line][:-1]
    best, expected = None, []
    for iteration, kl in zip((2, 4, 6, 8), kls, strict=True):
        if best is None or kl < best:
            expected.append(f"new best: iteration {iteration}, KL {kl:.6g}" + (f" (before {best:.6g})" if best else ""))
            best = kl
    assert [line for line in said if line.startswith("new best")] == expected and len(expected) > 1


def test_finished_job_says_that_nothing_is_to_do_and_ends(shop, finished):
    run, _ = finished
    metrics, row = run / "metrics.jsonl", '"validation/kl_to_teacher"'
    rows = metrics.read_text()
    output = shop.run("--save", str(run))
    assert f"megatron_qad: nothing to do: iteration 8 of 8 is already saved in {run}." in output
    assert f"resuming    from iteration 8 of {run}" in output and not LINE.search(output)
    assert "validation at iteration" not in output and "loading the" not in output
    assert metrics.read_text() == rows and (run / "megatron.log").read_text().count("---- start of ") == 2
    again = shop.run("--save", str(run), "--skip-train")
    assert "megatron_qad validation at iteration 8 |" in again and "nothing to do" not in again
    # As if the job had been killed in its last validation.
    kept = [line for line in rows.splitlines() if not (row in line and '"step": 8' in line)]
    metrics.write_text("\n".join(kept) + "\n")
    missing = shop.run("--save", str(run))
    assert f"megatron_qad: nothing to train: iteration 8 of 8 is already saved in {run}. It is validated." in missing
    assert "megatron_qad validation at iteration 8 |" in missing and row in metrics.read_text().splitlines()[-1]
    # As if the job had then resumed from iteration 6, trained to the end, and been killed again.
    metrics.write_text(metrics.read_text() + '{"step": 7}\n{"step": 8}\n')
    assert "nothing to train: " in shop.run("--save", str(run))
    assert "nothing to do: " in shop.run("--save", str(run))


def test_job_without_save_drops_it_or_shows_it(shop):
    dropped = shop.run("--train-iters", "1", nproc=1)
    assert "are dropped: no --save" in dropped and "arguments ----" not in dropped
    shown = shop.run("--train-iters", "1", "--qad-verbose", nproc=1)
    assert "---- arguments ----" in shown and "megatron_qad step times" not in shown  # one rank waits for nobody


def test_flops_of_packed_rows_count_documents(shop, tmp_path):
    """Attention within documents only. An early end is said."""
    flags = ("--dataloader-inter-document-masking", "--exit-interval", "2", "--tensorboard-dir", str(tmp_path))
    output = shop.run(*flags, "--save", str(tmp_path / "run"), function="count_documents")
    sums = [(int(tokens), int(squares)) for tokens, squares in re.findall(r"documents (\d+) (\d+)", output)]
    ranks = sums[:2], sums[2:]
    model, curves = forward_flops(family_of(tiny_job.LLAMA), tiny_job.LLAMA), read_scalars(tmp_path)
    for step in (0, 1):
        tokens, squares = (sum(rank[step][i] for rank in ranks) for i in (0, 1))
        assert tokens == BATCH * SEQ_LENGTH and squares < tokens * SEQ_LENGTH
        seconds = tokens / curves["speed/tokens_per_second"][step][1]
        student = curves["speed/student_tflops_per_rank"][step][1] * 1e12 * 2 * seconds
        assert student == pytest.approx(3 * model.of_sums(tokens, squares), rel=1e-6)  # event files hold float32
    assert "megatron_qad: the job stops after iteration 2 of 8; started again, it continues there" in output


def test_failure_in_another_package_is_on_the_terminal(shop):
    output = shop.run(function="fail", fails=True)
    assert output.count("Traceback") >= 1 and "RuntimeError: " in output and "torch.nn.functional.linear(" in output
