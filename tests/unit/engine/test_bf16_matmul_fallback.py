"""The BF16 fallback rounds float32 products once, leaves other dtypes alone, and is fast on every CPU."""

import contextlib
import time

import pytest
import torch

from megatron_qad.engine import capabilities, init_runtime
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback

F = torch.nn.functional
BATCHES, ROWS, INNER, COLUMNS = 3, 17, 33, 21


@contextlib.contextmanager
def only_torch():
    """Restore torch's own kernels inside the ``with`` block."""
    if (library := bf16_matmul_fallback.install()) is not None:
        library._destroy()
    bf16_matmul_fallback.install.cache_clear()
    try:
        yield
    finally:
        bf16_matmul_fallback.install()


@contextlib.contextmanager
def ours():
    library = bf16_matmul_fallback.register()
    try:
        yield
    finally:
        library._destroy()


@pytest.fixture
def registered():
    with only_torch(), ours():
        yield


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return batches of left, right and added operands, with values that BF16 represents."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCHES, ROWS, INNER), (BATCHES, INNER, COLUMNS), (BATCHES, ROWS, COLUMNS))
    return tuple(torch.randn(*shape, generator=generator).bfloat16().to(dtype) for shape in shapes)


def call_out(function, *args, **kwargs) -> torch.Tensor:
    """Call ``function`` with an ``out`` of NaN, which must not be read."""
    out = torch.full_like(args[-1] if "beta" in kwargs else function(*args, **kwargs), torch.nan)
    assert function(*args, **kwargs, out=out) is out
    return out


def call_in_place(target: torch.Tensor, method: str, *args, **kwargs) -> torch.Tensor:
    target = target.clone()
    memory = target.data_ptr()
    assert getattr(target, method)(*args, **kwargs).data_ptr() == memory
    return target


PRODUCTS = {
    "mm": lambda a, b, c: a[0] @ b[0],
    "mm transposed": lambda a, b, c: (b[0].t() @ a[0].t()).t(),
    "bmm": lambda a, b, c: a @ b,
    "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=2),
    "linear": lambda a, b, c: F.linear(a, b[0].t(), c[0, 0]),
    "mm.out": lambda a, b, c: call_out(torch.mm, a[0], b[0]),
    "bmm.out": lambda a, b, c: call_out(torch.bmm, a, b),
    "addmm.out": lambda a, b, c: call_out(torch.addmm, c[0], a[0], b[0]),
    "baddbmm.out": lambda a, b, c: call_out(torch.baddbmm, torch.full_like(c, torch.nan), a, b, beta=0),
    "addmm_": lambda a, b, c: call_in_place(c[0], "addmm_", a[0], b[0], alpha=2),
    "baddbmm_": lambda a, b, c: call_in_place(c, "baddbmm_", a, b),
    "empty": lambda a, b, c: a[0, :0] @ b[0],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_float32_product_rounded_once(name, registered):
    expected = PRODUCTS[name](*operands(torch.float32))
    product = PRODUCTS[name](*operands(torch.bfloat16))
    assert product.dtype == torch.bfloat16 and torch.equal(product, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_other_dtypes_are_left_alone(name, dtype):
    with only_torch():
        before = PRODUCTS[name](*operands(dtype))
        with ours():
            during = PRODUCTS[name](*operands(dtype))
    assert during.dtype == dtype and torch.equal(during, before)


def test_gradients_of_linear(registered):
    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs, weight, grad = operands(dtype)
        leaves = inputs.requires_grad_(), weight[0].t().clone().requires_grad_()
        F.linear(*leaves).backward(grad)
        return [leaf.grad for leaf in leaves]

    for gradient, expected in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, expected.bfloat16())


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention(masked, registered):
    """The forward pass is torch's own, and the backward pass reads its rounded output. Tolerance: 2^-8 of the largest
    gradient for that rounding and as much for the rounding of the gradient."""

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        leaves = [torch.randn(2, 4, 40, 16, generator=generator).bfloat16().to(dtype) for _ in range(3)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        mask = torch.ones(40, 40).tril().log().to(dtype) if masked else None
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=not masked)
        out.backward(torch.randn(out.shape, generator=generator).to(dtype))
        return [leaf.grad for leaf in leaves]

    for gradient, expected in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - expected).abs().max() <= 2 * 2**-8 * expected.abs().max()


@pytest.mark.skipif(capabilities().device != "cpu", reason="with a GPU the fallback is not installed")
def test_bf16_products_are_fast():
    """torch's plain loop takes 60 times as long as float32; converting the operands less than doubles the time."""
    init_runtime()

    def milliseconds(dtype: torch.dtype) -> float:
        left, right = (torch.randn(512, 512).to(dtype) for _ in range(2))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    assert milliseconds(torch.bfloat16) < 8 * milliseconds(torch.float32)
