"""The penalty and its gradient against autograd in float64."""

import torch

from megatron_qad.distillation.scale_growth import block_amaxes, scale_growth


def reference(weight, initial):
    amaxes = weight.unflatten(-1, (-1, 16)).abs().amax(dim=-1)
    return (amaxes / initial - 1).clamp(min=0).square().sum()


def test_against_autograd():
    generator = torch.Generator().manual_seed(0)
    start, now = (torch.randn(6, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    now[0, :2] = 9.0  # a tie: both elements carry the block's scale
    initial = block_amaxes(start)
    leaf = now.clone().requires_grad_()
    expected = reference(leaf, initial)
    expected.backward()
    value, gradient = scale_growth(now, initial)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-6)  # float32 of amax ratios less 1
    assert gradient[0, 0] == gradient[0, 1] > 0


def test_what_did_not_grow_is_free():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    initial = block_amaxes(weight)
    for now in (weight, weight * 0.5):
        value, gradient = scale_growth(now, initial)
        assert value == 0 and not gradient.any()


def test_blocks_that_were_zero_stay_out():
    value, gradient = scale_growth(torch.ones(1, 32), torch.tensor([[0.0, 0.5]]))
    assert value == 1 and not gradient[0, :16].any()
    torch.testing.assert_close(gradient[0, 16:], torch.full((16,), 2 * 1 / 0.5 / 16))


def test_bfloat16_amaxes_are_kept_exactly():
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert block_amaxes(weight).dtype == torch.bfloat16
    assert scale_growth(weight, block_amaxes(weight))[0] == 0
