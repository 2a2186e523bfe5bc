"""The resumable AdamW equals torch's at every step, also after Megatron's distributed optimizer has restored it."""

import copy

import pytest
import torch
from torch.optim.adamw import AdamW as TorchAdamW

from megatron_qad.engine.adamw import AdamW

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def step(optimizer, params, index: int) -> None:
    generator = torch.Generator().manual_seed(100 + index)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.fixture
def expected():
    """The parameters after each of ten steps of torch's own AdamW."""
    params = parameters()
    optimizer = TorchAdamW(params, **OPTIONS, fused=True)
    snapshots = []
    for index in range(10):
        step(optimizer, params, index)
        snapshots.append([param.detach().clone() for param in params])
    return snapshots


def assert_equal(params, values) -> None:
    assert all(torch.equal(param, value) for param, value in zip(params, values, strict=True))


def test_steps_equal_torch(expected):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for index in range(10):
        step(optimizer, params, index)
        assert_equal(params, expected[index])


def test_state_exists_before_first_step(expected):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    state = optimizer.state_dict()["state"]
    assert [set(s) for s in state.values()] == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    assert all(not value.any() for s in state.values() for value in s.values())
    step(optimizer, params, 0)
    assert_equal(params, expected[0])  # reading the state changed nothing


def test_resumes_from_its_own_state(expected):
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for index in range(5):
        step(optimizer, params, index)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"] = None  # as saved by a job on a GPU
    again = AdamW(params, **OPTIONS)
    again.load_state_dict(state)
    for index in range(5, 10):
        step(again, params, index)
    assert_equal(params, expected[9])
    assert all(group["fused"] for group in again.param_groups)


def test_resumes_from_a_step_in_the_parameter_groups(expected):
    """As in Megatron's loading: moments copied into the state, the counter in the group, one shared step tensor."""
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    for index in range(5):
        step(optimizer, params, index)
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
    for index in range(5, 10):
        step(again, params, index)
    assert_equal(params, expected[9])
    assert [again.state[param]["step"].item() for param in params] == [10, 10]
    assert all("step" not in group for group in again.param_groups)
