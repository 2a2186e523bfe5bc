"""Advice after a validation when the KL falls, rises or stays flat, and the noise of its change."""

import math

import pytest
import torch

from megatron_qad.engine import init_runtime

init_runtime()

from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.training.advice import Measured, advice  # noqa: E402
from megatron_qad.training.callbacks.validation_advice import change_noise  # noqa: E402


def history(*values: tuple[int, float, float | None], cross_entropy: float = 2.0) -> list[Measured]:
    return [Measured(iteration, kl, cross_entropy, noise) for iteration, kl, noise in values]


def test_a_fall_beyond_its_noise_goes_on():
    line = advice(history((50, 0.20, None), (100, 0.17, 0.002)))
    assert line == "KL fell by 15.0 % since iteration 50, more than its noise of 1.0 %: continue"


def test_a_rise_beyond_its_noise_is_said():
    assert "rose by 15.0 %" in (line := advice(history((50, 0.20, None), (100, 0.23, 0.002)))) and "worse" in line


def test_flat_twice_advises_to_stop_and_a_fall_between_starts_again():
    once = history((50, 0.20, None), (60, 0.199, 0.002))
    assert advice(once) == "KL fell by 0.5 % since iteration 50, within its noise of 1.0 %"
    twice = [*once, *history((70, 0.2, 0.002))]
    assert "flat within its noise of 1.0 % for 2 validations: consider stopping" in advice(twice)
    again = [*twice, *history((80, 0.1, 0.002), (90, 0.1, 0.002))]
    assert "consider stopping" not in advice(again)


def test_a_gap_below_one_percent_advises_to_stop():
    line = advice(history((50, 0.004, None), cross_entropy=0.408))  # Table 1 of the QAD report
    assert "KL is 0.98 % of the teacher's cross entropy, below 1 %" in line
    assert "below" not in advice(history((50, 0.0041, None), cross_entropy=0.408))


@pytest.mark.parametrize(
    ("steps", "due"), [((100, 149), None), ((100, 150), 150), ((150, 249), None), ((240, 360), 350)]
)
def test_benchmarks_are_due_at_150_and_then_every_100(steps, due):
    line = advice(history(*((step, 0.2, None) for step in steps)))
    assert (f"iteration {due} is reached" in line) if due else ("is reached" not in line)


def test_unknown_noise_and_nan():
    assert "its noise is unknown" in advice(history((50, 0.2, None), (100, 0.1, None)))
    assert "stop and look for the cause" in advice(history((50, math.nan, None)))
    assert "nothing to compare with" in advice(history((50, math.nan, None), (60, 0.1, None)))


def test_noise_of_a_change_is_that_of_its_microbatches():
    init_process_group()
    tokens = torch.full((400,), 8.0, dtype=torch.float64)
    text = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80  # hard and easy rows
    change = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 - 0.4
    before, now = torch.stack((text, tokens), 1), torch.stack((text + change, tokens), 1)
    noise = change_noise(before, now, None)
    expected = 1.96 * (change / 8).std().item() / 20
    assert noise == pytest.approx(expected, rel=1e-9)  # the same sums in float64, in another order
    assert change_noise(None, now, None) is None
    assert change_noise(before[:1], now[:1], None) is None
    assert change_noise(torch.stack((text, tokens + 1), 1), now, None) is None  # other tokens
    assert change_noise(before, before, None) == 0
