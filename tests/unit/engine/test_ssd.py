"""The chunked scan, convolution and gated norm of ``engine.cpu.ssd`` equal their definitions in float64."""

import pytest
import torch

from megatron_qad.engine.cpu import ssd

ROWS, HEADS, SIZE, GROUPS, STATE = 2, 4, 3, 2, 5
# float64 has 53 bits; sums of some hundred terms of order one.
TOLERANCE = 1e-12


def inputs(length: int) -> dict:
    torch.manual_seed(length)
    double = {"dtype": torch.float64}
    return {
        "x": torch.randn(ROWS, length, HEADS, SIZE, **double),
        "dt": torch.rand(ROWS, length, HEADS, **double),
        "A": -torch.rand(HEADS, **double) * 3,
        "B": torch.randn(ROWS, length, GROUPS, STATE, **double),
        "C": torch.randn(ROWS, length, GROUPS, STATE, **double),
    }


def token_by_token(x, dt, A, B, C, seq_idx=None, state=None):
    """Compute the recurrence by its definition."""
    rows, length, heads, size = x.shape
    state = x.new_zeros(rows, heads, size, B.shape[-1]) if state is None else state
    out = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        b, c = (v[:, t].repeat_interleave(heads // v.shape[2], dim=1) for v in (B, C))
        new = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + new
        out.append((state * c[:, :, None]).sum(-1))
    return torch.stack(out, dim=1), state


def seq_idx(length: int) -> torch.Tensor:
    """Return documents of different lengths in each row, from one token to more than a chunk."""
    ends = torch.tensor([[1, 4, 13, 14], [2, 3, 5, length - 1]])
    return (torch.arange(length)[None, :, None] >= ends[:, None]).sum(-1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 8, 19, 32])
def test_scan_equals_recurrence(length, packed):
    arguments = inputs(length)
    documents = seq_idx(length) if packed else None
    leaves = [t.requires_grad_() for t in arguments.values()]
    expected, expected_state = token_by_token(**arguments, seq_idx=documents)
    out, state = ssd.chunked_scan(**arguments, chunk_size=8, seq_idx=documents)
    assert (out - expected).abs().max() < TOLERANCE
    assert (state - expected_state).abs().max() < TOLERANCE
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert (a - b).abs().max() < TOLERANCE


def test_scan_continues_from_initial_state():
    arguments = inputs(20)
    whole, last = ssd.chunked_scan(**arguments, chunk_size=8)
    parts = [{n: t if n == "A" else t[:, part] for n, t in arguments.items()} for part in (slice(11), slice(11, 20))]
    first, state = ssd.chunked_scan(**parts[0], chunk_size=8)
    second, end = ssd.chunked_scan(**parts[1], chunk_size=8, initial_state=state)
    assert (torch.cat((first, second), dim=1) - whole).abs().max() < TOLERANCE
    assert (end - last).abs().max() < TOLERANCE


def test_gradients_are_finite_under_fast_decay():
    """exp of a large difference above the diagonal is infinite, and its masked gradient would be 0 * inf."""
    arguments = inputs(16) | {"A": torch.full((HEADS,), -2000.0, dtype=torch.float64)}
    leaves = [t.requires_grad_() for t in arguments.values()]
    out, _ = ssd.chunked_scan(**arguments, chunk_size=8)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


def test_convolution_equals_torch_conv1d():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 9, 6), (6, 4), (6,)))
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6).transpose(1, 2)
    assert (ssd.causal_conv1d(x, weight, bias) - expected).abs().max() < TOLERANCE
    assert (ssd.causal_conv1d(x[:, :2], weight, bias) - expected[:, :2]).abs().max() < TOLERANCE  # short input


def test_packed_documents_are_independent():
    """After convolution and scan each document has the same values as in a row of its own."""
    torch.manual_seed(1)
    inner, state, lengths = HEADS * SIZE, GROUPS * STATE, [5, 1, 17, 9]
    width = 2 * inner + 2 * state + HEADS
    zxbcdt = torch.randn(1, sum(lengths), width, dtype=torch.float64)
    weights = [torch.randn(inner + 2 * state, 4), torch.randn(inner + 2 * state), torch.randn(HEADS)]
    weights += [-torch.rand(HEADS), torch.randn(HEADS)]
    weights = [t.double() for t in weights]
    options = {"chunk_size": 8, "headdim": SIZE, "ngroups": GROUPS}
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = ssd.split_conv1d_scan_combined(zxbcdt, *weights, **options, seq_idx=documents)
    alone = [ssd.split_conv1d_scan_combined(part, *weights, **options) for part in zxbcdt.split(lengths, dim=1)]
    assert (packed - torch.cat(alone, dim=1)).abs().max() < TOLERANCE
    leaking = ssd.split_conv1d_scan_combined(zxbcdt, *weights, **options)
    assert (packed - leaking).abs().max() > 0.1


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm(norm_before_gate):
    torch.manual_seed(2)
    norm = ssd.GatedRMSNorm(12, group_size=4, norm_before_gate=norm_before_gate, dtype=torch.float64)
    x, z = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    gate = torch.nn.functional.silu(z)
    y = x if norm_before_gate else x * gate
    y = torch.cat([part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in y.split(4, -1)], -1)
    expected = y * norm.weight * (gate if norm_before_gate else 1)
    assert (norm(x, z) - expected).abs().max() < TOLERANCE


def test_megatron_uses_our_operations_and_no_mock(server):
    code = """
from megatron_qad.engine import init_runtime
print(init_runtime().report())
from megatron.core.ssm import mamba_mixer
import importlib.util
from megatron_qad.engine.cpu import ssd
assert mamba_mixer.HAVE_MAMBA_SSM and issubclass(mamba_mixer.ExtendedRMSNorm, ssd.GatedRMSNorm)
assert mamba_mixer.mamba_split_conv1d_scan_combined is ssd.split_conv1d_scan_combined
assert mamba_mixer._check_mamba_sequence_packing_support(for_inference_not_training=False) == (True, None)
assert importlib.util.find_spec("mamba_ssm") is not None
"""
    assert "mamba torch: " in server.run("script_jobs:code", 1, {"text": code})
