"""The grouped product equals a loop over the experts in values and gradients, for every load and dtype."""

import pytest
import torch

from megatron_qad.models.grouped_product import can_group, grouped_product, looped_product

LOADS = {
    "balanced": [5, 5, 5, 5],
    "skewed": [17, 1, 0, 2],
    "one expert": [0, 0, 20, 0],
    "last expert empty": [3, 16, 1, 0],
}


def operands(tokens: int, dtype, inputs: int = 32, outputs: int = 48) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, inputs), (4, outputs, inputs), (tokens, outputs)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def value_and_gradients(product, x, weight, output_grad, load) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = product(x, weight, load)
    return [output.detach(), *torch.autograd.grad(output, (x, weight), output_grad)]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_equals_loop(dtype, load):
    x, weight, output_grad = operands(20, dtype)
    assert can_group(x, weight)
    actual = value_and_gradients(grouped_product, x, weight, output_grad, LOADS[load])
    expected = value_and_gradients(looped_product, x, weight, output_grad, LOADS[load])
    # Two float32 sums of n <= 48 products in different orders differ by at most 2 * n roundings (2^-24) of the sum of
    # magnitudes, n * the largest product. A bfloat16 result is such a sum, rounded once: one more ulp, 2^-7.
    largest = max(t.abs().max().item() for t in (x, weight, output_grad)) ** 2
    tolerances = {"atol": 2 * 48 * 2**-24 * 48 * largest, "rtol": 2**-7 if dtype == torch.bfloat16 else 0}
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)
    empty = [i for i, tokens in enumerate(LOADS[load]) if tokens == 0]
    assert bool((actual[2][empty] == 0).all())


@pytest.mark.parametrize(
    ("dtype", "tokens", "inputs", "outputs"),
    [
        (torch.float64, 20, 32, 48),
        (torch.bfloat16, 20, 36, 48),  # rows of 72 bytes
        (torch.bfloat16, 20, 32, 52),  # rows of the gradient
        (torch.float32, 20, 33, 48),
        (torch.float32, 0, 32, 48),
    ],
)
def test_unsupported_products_use_the_loop(dtype, tokens, inputs, outputs):
    x, weight, output_grad = operands(tokens, dtype, inputs, outputs)
    load = [tokens // 2, 0, tokens - tokens // 2, 0]
    assert not can_group(x, weight)
    output, x_grad, weight_grad = value_and_gradients(grouped_product, x, weight, output_grad, load)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(load))
    expected = torch.einsum("ti,toi->to", x.double(), weight[index].double())
    # The same bound in the precision of the sums; bfloat16 results are rounded once, by 2^-8.
    largest = max(x.abs().max().item() if tokens else 0, weight.abs().max().item()) ** 2
    tolerance = 2 * 36 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * 36 * largest
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=2**-8 if dtype == torch.bfloat16 else 0)
    assert x_grad.shape == x.shape and weight_grad.shape == weight.shape


def test_product_without_tokens_reaches_the_weight():
    """Otherwise Megatron would wait for the gradient of a rank whose experts received no token."""
    x, weight, output_grad = operands(0, torch.float32)
    *_, weight_grad = value_and_gradients(grouped_product, x, weight, output_grad, [0] * 4)
    assert torch.equal(weight_grad, torch.zeros(4, 48, 32))


def test_supported_products_are_grouped():
    """Not by the loop, whose graph has one product per expert."""
    x, weight, _ = operands(20, torch.float32)
    output = grouped_product(x, weight.requires_grad_(), [5] * 4)
    assert type(output.grad_fn).__name__ == "GroupedMmBackward0"


@pytest.mark.parametrize(
    "total", [torch.sum, lambda y: y.t().contiguous().square().sum()], ids=["expanded", "transposed"]
)
def test_gradients_of_any_strides(total):
    x, weight, _ = operands(20, torch.float32)
    grads = []
    for product in (grouped_product, looped_product):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(total(product(*inputs, [5] * 4)), inputs))
    for a, b in zip(*grads, strict=True):
        # The bound above. Operands are at most 4.5, so outputs at most 32 * 4.5^2, and their gradient is twice that.
        torch.testing.assert_close(a, b, rtol=0, atol=2 * 48 * 2**-24 * 48 * (2 * 32 * 4.5**2) * 4.5)
