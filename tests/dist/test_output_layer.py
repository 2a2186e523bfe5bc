"""Teacher logits or hidden states, fused or separate output layer: losses, gradients and metrics are the same."""

import re

import pytest
import records
import tiny_job
from test_axes import CP2, PACKED, PP2, SP, STEADY, TP2, VIRTUAL
from test_training import MIXED_PRECISION, TOLERANCE, workshop  # noqa: F401  the fixture

LOSS = "kl(temperature=2)+0.5*reverse_kl+0.1*ce+topk(k=4)"
LOGITS = ["--qad-fused-linear-loss", "never", "--qad-teacher-output", "logits"]
HIDDEN = ["--qad-fused-linear-loss", "never", "--qad-teacher-output", "hidden"]
FUSED = ["--qad-fused-linear-loss", "always"]
COMBINED_MICROBATCHES = ["--qad-teacher-micro-batch-size", "4"]
CPU_OFFLOAD = ["--qad-teacher-cpu-offload"]
# Name: kind of model, ranks, flags of all jobs, and the flags of each job that is compared with LOGITS.
CASES = {
    "one rank": ("f32", 1, [], HIDDEN, FUSED),
    "tp2": ("f32", 2, TP2, FUSED),
    "tp2 sp": ("f32", 2, TP2 + SP, HIDDEN, FUSED),
    "tied tp2pp2": ("tied", 4, TP2 + SP + PP2, HIDDEN, FUSED),
    "virtual, on the host": ("f32", 2, PP2 + VIRTUAL, HIDDEN + CPU_OFFLOAD, FUSED + CPU_OFFLOAD),
    "packed cp2": ("f32", 2, CP2 + PACKED, FUSED),
    "packed tp2 sp, joined": (
        "f32",
        2,
        TP2 + SP + PACKED,
        HIDDEN + COMBINED_MICROBATCHES,
        FUSED + COMBINED_MICROBATCHES,
    ),
    "joined": ("f32", 1, [], HIDDEN + COMBINED_MICROBATCHES),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(workshop, case):  # noqa: F811
    """Compare losses, gradient norms, gradients and parameters of three steps, and an evaluation after them."""
    kind, nproc, flags, *modes = CASES[case]
    steps = ["--qad-policy", "bf16", "--qad-loss", LOSS, *STEADY, "--eval-interval", "3", "--eval-iters", "2"]
    argv = workshop.argv(*steps, *flags, kind=kind, num_steps=3)
    expected, output = workshop.train(argv + LOGITS, nproc)
    assert "output layer makes logits; the teacher's pass keeps logits" in output
    for mode in modes:
        steps_of_mode, log = workshop.train(argv + mode, nproc)
        assert "the teacher's pass keeps hidden states" in log
        for a, b in zip(steps_of_mode, expected, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE), mode
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=TOLERANCE), mode
        for what in ("grads", "params"):
            error, where = records.largest_error(steps_of_mode, expected, what)
            print(f"{case} {' '.join(mode)} {what}: {error:.1e}")
            assert error <= TOLERANCE, (mode, what, where)
        assert _metrics(log) == pytest.approx(_metrics(output), rel=1e-4), mode  # the log prints five digits


def _metrics(output: str) -> dict[str, float]:
    line = re.findall(r"megatron_qad validation at iteration \d+ \| (.*)", output)[-1]
    return {name: float(value) for name, value in (part.split(": ") for part in line.split(" | "))}


def test_teacher_with_another_hidden_size(workshop):  # noqa: F811
    large = tiny_job.LLAMA | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 32}
    directory = workshop.directory
    models = [(str(tiny_job.write_hf(directory / "hf_large", large)), f"{directory}/large", "float32")]
    workshop.server.run("training_jobs:import_checkpoints", 1, {"models": models})
    argv = workshop.argv("--qad-policy", "bf16", *STEADY, *TP2, *SP, num_steps=2)
    argv += ["--qad-teacher", f"{directory}/large"]
    expected, _ = workshop.train(argv + LOGITS, 2)
    fused, _ = workshop.train(argv + FUSED, 2)
    assert [s["loss"] for s in fused] == [pytest.approx(s["loss"], rel=TOLERANCE) for s in expected]
    assert records.largest_error(fused, expected, "grads")[0] <= TOLERANCE


def test_quantized_head_is_calibrated_and_fused(workshop):  # noqa: F811
    """The fused layer quantizes its input with the calibrated quantizer of the head: same amax, same losses."""
    argv = workshop.argv("--qad-policy-override", "head=nvfp4", *TP2, *SP, num_steps=1)
    (expected,), _ = workshop.train(argv + LOGITS, 2)
    (fused,), _ = workshop.train(argv + FUSED, 2)
    assert fused["amaxes"]["output_layer"] == expected["amaxes"]["output_layer"] > 0
    assert fused["loss"]["kl loss"] == pytest.approx(expected["loss"]["kl loss"], rel=TOLERANCE)
    unquantized, _ = workshop.train(workshop.argv(*TP2, *SP, *FUSED, num_steps=1), 2)
    assert abs(unquantized[0]["loss"]["kl loss"] / fused["loss"]["kl loss"] - 1) > 1e-3


def test_mixed_precision_with_a_distributed_optimizer(workshop):  # noqa: F811
    """Gradients go to the float32 ``main_grad``. Logits are rounded to bfloat16 in both modes."""
    argv = workshop.argv("--qad-policy", "bf16", *MIXED_PRECISION, kind="bf16", num_steps=4)
    expected, _ = workshop.train(argv + LOGITS, 2, whole=False)
    fused, _ = workshop.train(argv + FUSED, 2, whole=False)
    for a, b in zip(fused, expected, strict=True):
        # The logits' gradient is rounded in the same way for a chunk; its products are summed in another order.
        assert a["loss"]["kl loss"] == pytest.approx(b["loss"]["kl loss"], rel=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-3)


def test_contradictory_flags_raise(workshop):  # noqa: F811
    error = workshop.fail(workshop.argv("--qad-loss", "kl+jsd", *FUSED))
    assert "jsd reads all logits twice" in error
    error = workshop.fail(workshop.argv(*FUSED, "--qad-teacher-output", "logits"))
    assert "needs the teacher's hidden states" in error
    # The check runs before any weight is allocated, also in a dry run.
    error = workshop.fail(workshop.argv("--qad-loss", "topk(k=129)", "--qad-dry-run", *TP2), 2)
    assert "topk(k=129): k must not exceed the 128 columns of one rank's shard" in error
