"""Compares the scale-growth penalty and its gradient with float64 autograd."""

import torch

from megatron_qad.distillation.scale_growth import block_amaxes, scale_growth


def reference(weight, initial):
    amaxes = weight.unflatten(-1, (-1, 16)).abs().amax(dim=-1)
    return (amaxes / initial - 1).clamp(min=0).square().sum()


def test_equals_autograd():
    generator = torch.Generator().manual_seed(0)
    start, now = (torch.randn(6, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    now[0, :2] = 9.0  # a tie for the block's amax
    initial = block_amaxes(start)
    leaf = now.clone().requires_grad_()
    expected = reference(leaf, initial)
    expected.backward()
    value, gradient = scale_growth(now, initial)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-6)  # float32 amax ratios minus 1
    assert gradient[0, 0] == gradient[0, 1] > 0


def test_blocks_that_did_not_grow_have_no_penalty():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    initial = block_amaxes(weight)
    for now in (weight, weight * 0.5):
        value, gradient = scale_growth(now, initial)
        assert value == 0 and not gradient.any()


def test_blocks_that_were_zero_are_skipped():
    value, gradient = scale_growth(torch.ones(1, 32), torch.tensor([[0.0, 0.5]]))
    assert value == 1 and not gradient[0, :16].any()
    torch.testing.assert_close(gradient[0, 16:], torch.full((16,), 2 * 1 / 0.5 / 16))


def test_bfloat16_amaxes_are_exact():
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert block_amaxes(weight).dtype == torch.bfloat16
    assert scale_growth(weight, block_amaxes(weight))[0] == 0
