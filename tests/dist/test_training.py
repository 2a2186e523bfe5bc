"""pretrain_qad.py's training, through Megatron's own loop: layouts agree, a stop changes nothing, errors are clear.

Every job is a tiny Llama with a teacher that differs from the student, three or more microbatches a step, and documents
that count different shares of their tokens.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import records
import tiny_job
import torch
from fork_server import ForkServer
from launch import ROOT, environment
from safetensors.torch import load_file, save_file

VOCAB = tiny_job.LLAMA["vocab_size"]
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2pp2": (4, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
}
MIXED_PRECISION = ["--bf16", "--use-distributed-optimizer"]
# Sums in another order move the last bits of float32 (6e-8): measured at most 3e-7 in losses and gradient norms, and
# 5e-6 in the norm of a tensor's gradient, which small differences of large terms make.
TOLERANCE = 1e-5


class Workshop:
    """The checkpoints and data of this file's jobs, and the server that runs them."""

    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        self._number = 0

    def argv(self, *flags: str, kind: str = "f32", num_steps: int = 10) -> list[str]:
        """A command line. ``kind`` names the pair of checkpoints: f32, bf16 or tied (float32)."""
        d = self.directory
        return [
            *("--qad-teacher", f"{d}/{kind}_teacher", "--qad-student", f"{d}/{kind}_student"),
            *("--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache", "--split", "80,20,0"),
            *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8"),
            *("--train-iters", str(num_steps), "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"),
            *("--eval-interval", "1000", "--eval-iters", "0", "--log-interval", "1", "--qad-calibration-samples", "16"),
            *tiny_job.READ_HERE,
            *flags,
        ]

    def train(self, argv: list[str], nproc: int = 1, whole: bool = True, **watch) -> tuple[list[dict], str]:
        """Run a job that must succeed; its steps and its output. ``watch``: see ``training_jobs.train``, ``whole``:
        see ``records.read``."""
        self._number += 1
        record = self.directory / f"record{self._number}"
        output = self.server.run("training_jobs:train", nproc, {"argv": argv, "record": str(record)} | watch)
        return records.read(record, nproc, vocab_size=VOCAB, whole=whole), output

    def fail(self, argv: list[str], nproc: int = 1) -> str:
        """Run a job that must stop with one error of ours; the error's text."""
        output = self.server.run("training_jobs:train", nproc, {"argv": argv}, fails=True)
        assert "Traceback" not in output, output
        (line,) = {line for line in output.splitlines() if line.startswith("error: ")}
        return line


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("training")
    tied = tiny_job.LLAMA | {"tie_word_embeddings": True}
    for name, config in (("untied", tiny_job.LLAMA), ("tied", tied)):
        tiny_job.write_hf(directory / f"hf_{name}_teacher", config)
        tiny_job.write_hf(directory / f"hf_{name}_student", config, noise=0.3)
    damaged = load_file(tiny_job.write_hf(directory / "hf_inf", tiny_job.LLAMA) / "model.safetensors")
    damaged["model.norm.weight"] *= 1e10
    damaged["lm_head.weight"] *= 1e30  # finite weights, infinite logits
    save_file(damaged, directory / "hf_inf" / "model.safetensors")
    tiny_job.write_hf(directory / "hf_other_vocab", tiny_job.LLAMA | {"vocab_size": 130})
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    for who, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_seed30_{who}", tiny_job.LLAMA, seed=30, noise=noise)
    models = [("inf", "inf", "float32"), ("other_vocab", "other_vocab", "float32")]
    for who in ("teacher", "student"):
        models.append((f"untied_{who}", f"f32_{who}", "float32"))
        models.append((f"untied_{who}", f"bf16_{who}", "bfloat16"))
        models.append((f"seed30_{who}", f"seed30_{who}", "float32"))
        models.append((f"tied_{who}", f"tied_{who}", "float32"))
    models = [(f"{directory}/hf_{source}", f"{directory}/{target}", dtype) for source, target, dtype in models]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


CASES = {
    "unquantized": ("f32", "bf16", ("tp2", "pp2", "tp2pp2", "dp2")),
    "tied": ("tied", "bf16", ("tp2pp2",)),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts_agree(workshop, case):
    """Losses, gradient norms, each tensor's gradient and parameters of 10 steps equal TP1xPP1's."""
    kind, policy, layouts = CASES[case]
    argv = workshop.argv("--qad-policy", policy, kind=kind)
    expected, _ = workshop.train(argv)
    assert [len(step["batches"]) for step in expected] == [4] * 10
    counts = {int(batch["loss_mask"].count_nonzero()) for step in expected for batch in step["batches"]}
    assert len(counts) > 20, "loss masks are too even to tell a mean of means from a mean"
    assert expected[0]["loss"]["kl loss"] > 0.1
    for layout in layouts:
        nproc, flags = LAYOUTS[layout]
        found, _ = workshop.train(argv + flags, nproc)
        for a, b in zip(found, expected, strict=True):
            assert a["loss"]["kl loss"] == pytest.approx(b["loss"]["kl loss"], rel=TOLERANCE), layout
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=TOLERANCE), layout
        for what in ("grads", "params", "quantized"):
            error, where = records.largest_error(found, expected, what)
            print(f"{case} {layout} {what}: {error:.1e} at {where}")
            assert error <= TOLERANCE, (layout, what, where)


@pytest.mark.parametrize("kind", ["f32", "seed30"])
def test_layouts_agree_in_nvfp4(workshop, kind):
    """Every step of a quantized job, from the state that TP1xPP1 had there, has TP1xPP1's loss and gradients.

    A free job parts from TP1xPP1 sooner or later, because rounding turns a last bit into another code: of five
    seeds three did within 10 steps (seed30 at step 3, gradients off by half), where unquantized ones stay within 5e-6.
    So each step starts from TP1xPP1's parameters, and seed30 is here because it was the worst.
    """
    argv = workshop.argv("--qad-policy", "nvfp4-all-linear", kind=kind)

    def agrees(found, expected) -> list[bool]:
        steps = []
        for a, b in zip(found, expected, strict=True):
            error = max(
                abs(a["loss"]["kl loss"] / b["loss"]["kl loss"] - 1),
                abs(a["grad_norm"] / b["grad_norm"] - 1),
                *(records.largest_error([a], [b], what)[0] for what in ("grads", "quantized")),
            )
            steps.append(error <= TOLERANCE)
        return steps

    def both(layout, **watch):
        expected, _ = workshop.train(argv, **watch)
        follow = str(workshop.directory / f"record{workshop._number}")
        nproc, flags = LAYOUTS[layout]
        return workshop.train(argv + flags, nproc, follow=follow, **watch)[0], expected

    # Stages and data-parallel ranks run TP1's arithmetic: no code can differ.
    for layout in ("pp2", "dp2"):
        found, expected = both(layout)
        _assert_quantized(expected)
        assert agrees(found, expected) == [True] * 10, layout
    # Quantized weights: the same masters give the same codes in shards. Activations are quantized in step 1 only.
    found, expected = both("tp2pp2", weights_only=True)
    _assert_quantized(expected)
    assert agrees(found, expected)[1:] == [True] * 9
    # Activations too: tensor parallelism adds in another order, and some input's code flips in one step of thirteen.
    found, expected = both("tp2")
    steps = agrees(found, expected)
    losses = [abs(a["loss"]["kl loss"] / b["loss"]["kl loss"] - 1) for a, b in zip(found, expected, strict=True)]
    print(f"{kind} tp2: {sum(steps)} of 10 steps within {TOLERANCE}, losses within {max(losses):.1e}")
    assert sum(steps) >= 5
    assert max(losses) < 0.05  # a flipped code moves one input of one token; a wrong scale moves all of them


def _assert_quantized(steps) -> None:
    """During a step the decoder's GEMMs, and nothing else, are on the grid: few values a block of 16."""
    for step in steps:
        for name, weight in step["quantized"].items():
            is_gemm = weight.dim() == 2 and name.startswith("decoder")
            # E2M1 has 15 values, one of them zero, so 16 numbers on the grid are never all different.
            blocks = weight.reshape(-1, 16).sort(dim=1).values
            repeats = (blocks[:, 1:] == blocks[:, :-1]).any(dim=1).float().mean().item()
            assert repeats == 1.0 if is_gemm else repeats < 0.5, name
        assert len(step["amaxes"]) == 8


RESUMES = {
    "bf16": ("bf16", "tp1", MIXED_PRECISION),
    "bf16 tp2": ("bf16", "tp2", MIXED_PRECISION),
    "float32": ("f32", "tp1", []),
    "float32 tp2": ("f32", "tp2", []),
}


@pytest.mark.parametrize("case", RESUMES)
def test_resuming_changes_nothing(workshop, tmp_path, case):
    """A stop after step 5 and a second process give the uninterrupted run's steps 6 to 10, bit for bit."""
    kind, layout, flags = RESUMES[case]
    nproc, layout_flags = LAYOUTS[layout]
    # An evaluation every third step, and more calibration data than a step reads: both must leave the data in order.
    evaluating = ["--eval-interval", "3", "--eval-iters", "2", "--qad-calibration-samples", "24"]
    argv = workshop.argv(*flags, *layout_flags, *evaluating, kind=kind)
    through, output = workshop.train(argv, nproc)
    saving = ["--save", str(tmp_path), "--save-interval", "5", "--exit-interval", "5"]
    first, _ = workshop.train(argv + saving, nproc)
    assert len(first) == 5
    second, resumed = workshop.train([*argv, "--load", str(tmp_path)], nproc)
    assert "masters are lost" not in resumed
    assert len(second) == 5
    for number, (a, b) in enumerate(zip(first + second, through, strict=True), 1):
        assert a["loss"] == b["loss"], number
        assert a["grad_norm"] == b["grad_norm"], number
        for what in ("quantized", "grads", "params", "masters", "amaxes"):
            assert a[what].keys() == b[what].keys()
            assert all(torch.equal(a[what][name], b[what][name]) for name in b[what]), (number, what)
    assert bool(through[-1]["masters"]) == (kind == "bf16")
    validations = [line for line in output.splitlines() if "validation at iteration" in line]
    resumed_validations = [line for line in resumed.splitlines() if "validation at iteration" in line]
    assert resumed_validations == validations[1:] and len(validations) == 4

    if case == "bf16":
        _test_lost_masters(workshop, argv, tmp_path, through)
        bad = workshop.fail([*argv, "--load", str(tmp_path), "--qad-teacher", f"{workshop.directory}/inf"])
        assert "step 6: a loss or a gradient is NaN or Inf" in bad and "the teacher: " in bad


def _test_lost_masters(workshop, argv, checkpoint, through) -> None:
    steps, output = workshop.train([*argv, "--load", str(checkpoint), "--no-load-optim", "--train-iters", "6"])
    (warning,) = [line for line in output.splitlines() if "masters are lost" in line]
    assert "--no-load-optim" in warning and str(checkpoint) in warning
    # What the warning says: the masters were rounded, so the step after differs.
    masters, exact = steps[0]["masters"], through[5]["masters"]
    assert any(not torch.equal(masters[name], exact[name]) for name in exact)


def test_evaluation_takes_no_training_data(workshop):
    """The microbatches that calibration read ahead go to training, however many evaluations come between."""
    few = workshop.argv("--qad-calibration-samples", "1", num_steps=4)
    many = workshop.argv("--qad-calibration-samples", "20", "--eval-interval", "1", "--eval-iters", "1", num_steps=4)
    a, b = (workshop.train(argv)[0] for argv in (few, many))
    for step, other in zip(a, b, strict=True):
        for batch, other_batch in zip(step["batches"], other["batches"], strict=True):
            assert torch.equal(batch["tokens"], other_batch["tokens"])


def test_in_place_weights_equal_fake_quantization_in_the_forward_pass(workshop, tmp_path):
    """20 BF16 steps of 4 microbatches: losses, gradients and float32 masters are those of a plain loop, bit for bit."""
    lr, decay = 1e-3, 0.01
    # No clipping: its norm is a sum in another order. It has nothing to do with quantization.
    flags = ["--lr-decay-style", "constant", "--clip-grad", "0", "--weight-decay", str(decay)]
    argv = workshop.argv(*MIXED_PRECISION, *flags, kind="bf16", num_steps=20)
    steps, _ = workshop.train(argv)
    result = tmp_path / "plain.pt"
    record = workshop.directory / f"record{workshop._number}"
    arguments = {"argv": argv, "record": str(record), "result": str(result), "lr": lr, "weight_decay": decay}
    workshop.server.run("plain_qad:train", 1, arguments)
    plain = torch.load(result)
    assert len(plain) == 20
    print("kl loss", [round(step["loss"], 4) for step in plain])
    for number, (a, b) in enumerate(zip(steps, plain, strict=True), 1):
        assert a["loss"]["kl loss"] == b["loss"], number
        for what in ("grads", "masters"):
            assert a[what].keys() == b[what].keys()
            for name, expected in b[what].items():
                assert torch.equal(a[what][name], expected[: len(a[what][name])]), (number, what, name)
    moved = [not torch.equal(plain[0]["masters"][name], plain[-1]["masters"][name]) for name in plain[0]["masters"]]
    assert all(moved)


# Layout, flags, and the case whose numbers it must have to the last bit. Not compared: two data-parallel ranks with one
# (they add their halves of the gradients) and, where the head is tied, stages (each adds its part of the embedding's).
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
COUNTED = {
    "one rank": ("tp1", [], None),
    "recompute": ("tp1", RECOMPUTE, "one rank"),
    "pipeline": ("pp2", ["--use-distributed-optimizer"], "one rank"),
    "distributed optimizer": ("dp2", ["--use-distributed-optimizer"], None),
    "overlapped gather": ("dp2", ["--use-distributed-optimizer", *OVERLAP], "distributed optimizer"),
}


@pytest.mark.parametrize("kind", ["bf16", "tied"])
def test_each_weight_is_quantized_once_a_step(workshop, kind):
    """Whatever the microbatches, recompute, evaluations and the way parameters are gathered: one a step, and the same
    losses and weights."""
    num_steps, found = 4, {}
    for name, (layout, flags, reference) in COUNTED.items():
        nproc, layout_flags = LAYOUTS[layout]
        argv = workshop.argv(
            *("--bf16", "--eval-interval", "2", "--eval-iters", "2"),
            *flags,
            *layout_flags,
            kind=kind,
            num_steps=num_steps,
        )
        workshop._number += 1
        record = workshop.directory / f"record{workshop._number}"
        workshop.server.run("training_jobs:train", nproc, {"argv": argv, "record": str(record)})
        ranks = [torch.load(f"{record}.rank{rank}") for rank in range(nproc)]
        for steps in ranks:
            assert [step["num_quantizations"] for step in steps] == list(range(1, num_steps + 1)), name
        # Gradients of the distributed optimizer are parts: what every rank holds whole are the weights of the step.
        weights = [{n: v[0] for rank in ranks for n, v in rank[i]["quantized"].items()} for i in range(num_steps)]
        found[name] = [step["loss"]["kl loss"] for step in ranks[-1]], weights
        if reference is None or (kind == "tied" and layout == "pp2"):
            continue
        assert found[name][0] == found[reference][0], name
        for a, b in zip(weights, found[reference][1], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[w], b[w]) for w in a), name


def test_a_stage_without_quantizers_calibrates_with_the_others(workshop):
    """The loss and gradients of one rank, where the first pipeline stage is all BF16; no rank waits for another."""
    kept = ("--qad-policy-override", "decoder.layers.0.*=bf16", "decoder.layers.1.*=bf16")
    argv = workshop.argv("--qad-policy", "nvfp4-all-linear", *kept, num_steps=1)
    (expected,), _ = workshop.train(argv)
    assert {name.split(".")[2] for name in expected["amaxes"]} == {"2", "3"}
    (found,), _ = workshop.train(argv + LAYOUTS["pp2"][1], 2)
    assert found["loss"]["kl loss"] == pytest.approx(expected["loss"]["kl loss"], rel=TOLERANCE)
    assert records.largest_error([found], [expected], "grads")[0] <= TOLERANCE


def test_a_trained_checkpoint_is_evaluated_without_training(workshop, tmp_path):
    """--skip-train, which finds what the end of training found."""
    argv = workshop.argv(*MIXED_PRECISION, "--eval-interval", "2", "--eval-iters", "2", kind="bf16", num_steps=2)
    argv += ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    lines = []
    for more in ([], ["--skip-train"]):
        output = workshop.server.run("training_jobs:train", 1, {"argv": argv + more})
        lines += [line for line in output.splitlines() if "megatron_qad validation at iteration 2 | kl_to" in line]
        assert "The high-precision masters are lost" not in output
    assert len(lines) == 3 and len(set(lines)) == 1, lines
    error = workshop.fail([*argv, "--qad-weight-scale-rule", "mse"])
    assert "holds checkpoints of --qad-weight-scale-rule max; this job has mse" in error


def test_a_microbatch_passes_through_ten_files(workshop, tmp_path):
    """From the dataset to the gradient, without what runs inside a model's layers."""
    few = ("--qad-calibration-samples", "2")  # it reads ahead: here one microbatch of the second step
    given = {"argv": workshop.argv(*few, num_steps=2), "result": str(tmp_path / "files"), "num_microbatches": 4}
    workshop.server.run("training_jobs:files_of_a_microbatch", 1, given)
    assert torch.load(tmp_path / "files") == [
        "megatron_qad/data/dataset.py",
        "megatron_qad/distillation/divergences.py",
        "megatron_qad/distillation/tiles.py",
        "megatron_qad/distillation/vocab_parallel.py",
        "megatron_qad/models/output_layer.py",
        "megatron_qad/training/batch.py",
        "megatron_qad/training/job.py",
        "megatron_qad/training/loss.py",
        "megatron_qad/training/teacher.py",
        "pretrain_qad.py",
    ]


def test_few_functions_of_megatrons_loop_are_replaced(workshop, tmp_path):
    """Three of them without asynchronous saves, whose process needs a GPU; the table has four (unit/engine). And one
    helper that the loop's module imports for its progress log."""
    saving = ("--save", str(tmp_path / "run"), "--save-interval", "1")
    argv = workshop.argv(*saving, num_steps=1)
    workshop.server.run("training_jobs:compare_loop", 1, {"argv": argv, "result": str(tmp_path / "changed")})
    functions = ["get_forward_backward_func", "save_checkpoint", "train_step"]
    assert torch.load(tmp_path / "changed.meanwhile") == ["append_to_progress_log", *functions]
    assert torch.load(tmp_path / "changed.afterwards") == ["append_to_progress_log"]


def test_qat_trains_without_the_teachers_pass(workshop, tmp_path):
    """A loss without a teacher costs no pass of it; the evaluation, which compares both models, has it."""
    argv = workshop.argv("--qad-loss", "ce", "--eval-interval", "1", "--eval-iters", "1", num_steps=1)
    workshop.server.run("axes_jobs:measure_schedule", 1, {"argv": argv, "result": str(tmp_path / "times")})
    training, evaluation, *_ = torch.load(tmp_path / "times.rank0")
    kinds = ["".join(kind for kind, _, _ in step) for step in (training, evaluation)]
    assert kinds == [
        8 * "F" + 4 * "FB",
        4 * "T" + 4 * "T",
    ]  # calibration and training; teacher and student, no gradients


def test_bad_input_stops_with_one_error(workshop, tmp_path):
    d = workshop.directory
    error = workshop.fail(workshop.argv("--qad-teacher", f"{d}/inf"))
    assert "step 1: a loss or a gradient is NaN or Inf" in error and "the output of output_layer" in error
    error = workshop.fail(workshop.argv("--qad-teacher", f"{d}/other_vocab"))
    assert "vocab_size is 130 in the teacher" in error and "120 in the student" in error
    assert "needs --qad-teacher" in workshop.fail(["--qad-student", f"{d}/f32_student", "--train-iters", "1"])
    assert "--qad-student or --qad-teacher" in workshop.fail(["--qad-loss", "ce", "--train-iters", "1"])
    assert "no hf/config.json" in workshop.fail(["--qad-teacher", str(tmp_path)])
    error = workshop.fail(workshop.argv("--tensor-model-parallel-size", "4"), 1)
    assert "does not divide the key-value heads (2); possible for the student: 1, 2" in error
    assert "at most one stage per layer" in workshop.fail(workshop.argv("--pipeline-model-parallel-size", "5"))
    assert "--qad-loss 'mze': unknown loss 'mze'; did you mean 'mse'?" in workshop.fail(
        workshop.argv("--qad-loss", "mze")
    )
    error = workshop.fail(workshop.argv("--qad-weight-scale-rule", "min"))
    assert "'min': expected one of max, four_over_six, mse" in error
    error = workshop.fail(workshop.argv("--qad-calibration-percentile", "0"))
    assert "--qad-calibration-percentile 0.0: expected a number above 0" in error


def test_the_command_line(workshop, tmp_path):
    """torchrun pretrain_qad.py --config FILE on two ranks, and what it says of a key that does not exist."""
    argv = workshop.argv(*MIXED_PRECISION, kind="bf16", num_steps=2)
    config = tmp_path / "job.yaml"
    config.write_text("tensor_model_parallel_size: 2\nsequence-parallel: true\nqad_policy: bf16\ntrain-iters: 50\n")
    done = _torchrun(2, ["--config", str(config), *argv])
    assert done.returncode == 0, done.stdout
    assert "weights of this rank quantized in place: none (policy bf16)" in done.stdout
    assert "iteration        2/       2" in done.stdout  # the flag wins over the file
    for sentence in ("device cpu: torch", "collectives gloo", "layer spec local", "kernels torch"):
        assert sentence in done.stdout
    config.write_text("train-iter: 50\n")
    failed = _torchrun(1, ["--config", str(config), *argv])
    assert failed.returncode != 0
    assert f"error: --config {config}: unknown key 'train-iter'; did you mean 'train-iters'?" in failed.stdout


def _torchrun(nproc: int, argv: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return subprocess.run(
        [*command, "pretrain_qad.py", *argv],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
