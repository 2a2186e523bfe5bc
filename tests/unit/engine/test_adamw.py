"""The resumable AdamW is torch's, step for step, and restarts where Megatron's distributed optimizer leaves it."""

import copy

import pytest
import torch
from torch.optim.adamw import AdamW as TorchAdamW

from megatron_qad.engine.adamw import AdamW

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def step(optimizer, params, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.fixture
def straight():
    """torch's own parameters after each of ten steps."""
    params = parameters()
    optimizer = TorchAdamW(params, **OPTIONS, fused=True)
    found = []
    for number in range(10):
        step(optimizer, params, number)
        found.append([param.detach().clone() for param in params])
    return found


def assert_equal(params, expected) -> None:
    assert all(torch.equal(param, value) for param, value in zip(params, expected, strict=True))


def test_steps_equal_torchs(straight):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for number in range(10):
        step(optimizer, params, number)
        assert_equal(params, straight[number])


def test_the_state_is_there_before_the_first_step(straight):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    state = optimizer.state_dict()["state"]
    assert [set(s) for s in state.values()] == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    assert all(not value.any() for s in state.values() for value in s.values())
    step(optimizer, params, 0)
    assert_equal(params, straight[0])  # asking changed nothing


def test_resumes_from_its_own_state(straight):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for number in range(5):
        step(optimizer, params, number)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"] = None  # as a job on a GPU leaves it
    again = AdamW(params, **OPTIONS)
    again.load_state_dict(state)
    for number in range(5, 10):
        step(again, params, number)
    assert_equal(params, straight[9])
    assert all(group["fused"] for group in again.param_groups)


def test_resumes_from_a_step_in_the_parameter_groups(straight):
    """As Megatron restores it: moments copied into the state, the counter in the group, one tensor for all."""
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for number in range(5):
        step(optimizer, params, number)
    moments = [{name: optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")} for p in params]

    again = AdamW(params, **OPTIONS)
    state = again.state_dict()
    shared = torch.tensor(0.0)
    for restored in state["state"].values():
        restored["step"] = shared
    for group in state["param_groups"]:
        group["step"] = 5
    again.load_state_dict(state)
    for param, values in zip(params, moments, strict=True):
        for name, value in values.items():
            again.state[param][name].copy_(value)
    for number in range(5, 10):
        step(again, params, number)
    assert_equal(params, straight[9])
    assert [again.state[param]["step"].item() for param in params] == [10, 10]
    assert all("step" not in group for group in again.param_groups)
