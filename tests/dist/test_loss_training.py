"""--qad-loss inside Megatron's training loop: names of terms, weight schedules, agreement across parallelism."""

import pytest
import records
from test_training import PARALLELISM, TOLERANCE, workshop  # noqa: F401  the fixture

NAMES = ("kl", "reverse_kl", "jsd", "confidence_kl", "topk", "mse", "ce")
ALL = "kl(temperature=2)+reverse_kl+jsd(beta=0.3)+0.1*confidence_kl+topk(k=8)+0.01*mse+linear(1, 0, 1, 4)*ce"
WEIGHTS = [(1, 1, 1, 0.1, 1, 0.01, weight) for weight in (1, 2 / 3, 1 / 3, 0, 0)]


def test_all_losses_with_and_without_parallelism(workshop):  # noqa: F811
    argv = workshop.argv("--qad-loss", ALL, "--qad-policy", "bf16", num_steps=5)
    expected, output = workshop.train(argv)
    for step, weights in zip(expected, WEIGHTS, strict=True):
        loss = step["loss"]
        assert loss.keys() == {f"{name} loss" for name in (*NAMES, "total")}
        total = sum(weight * loss[f"{name} loss"] for name, weight in zip(NAMES, weights, strict=True))
        assert loss["total loss"] == pytest.approx(total, rel=1e-6)  # float32 sums over microbatches
    for name in NAMES:
        assert f"{name} loss: " in output
    # Each step starts from the parameters of the single-rank job. Otherwise Adam's first steps, which divide small
    # gradients by their own size, amplify the last bits of reverse_kl's gradient to 2e-5 (measured).
    follow = str(workshop.directory / f"record{workshop._number}")
    nproc, flags = PARALLELISM["tp2pp2"]
    steps, _ = workshop.train(argv + flags, nproc, follow=follow)
    for a, b in zip(steps, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
    error, where = records.largest_error(steps, expected, "grads")
    assert error <= TOLERANCE, where


def test_cross_entropy_runs_without_teacher(workshop):  # noqa: F811
    argv = workshop.argv("--qad-loss", "0.5*ce", "--qad-policy", "bf16", num_steps=2)
    del argv[:2]  # the teacher
    steps, _ = workshop.train(argv)
    assert all(step["loss"].keys() == {"ce loss"} for step in steps)
    assert "needs --qad-teacher" in workshop.fail([*argv, "--qad-loss", "ce+0.1*jsd"])
