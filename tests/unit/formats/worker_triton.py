"""Subprocess of test_nvfp4_triton.py. `interpret` compares the kernels in Triton's interpreter with the PyTorch
reference; `compile` compiles them for GPUs that need not be present and checks the PTX."""

import re
import sys

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4, nvfp4_multi_tensor, nvfp4_triton
from megatron_qad.formats.block_scales import KERNEL_RULES
from megatron_qad.formats.common import tensor_amax


def truncated(x):
    """Cast float32 to bfloat16 by truncation, as Triton's interpreter does."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def expected(x, scale, rule):
    reference = nvfp4.fake_quant(x.float(), scale, rule=rule)
    return truncated(reference) if x.dtype == torch.bfloat16 else reference.to(x.dtype)


def same(x, y):
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.equal(x.view(integer), y.view(integer))  # the sign of zero counts


def made(rows, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x[: rows // 8], x[rows // 2, ::3] = 0.0, -0.0
    x[rows // 3] = torch.randint(-24, 25, (dim,), generator=generator) / 4
    return x.clamp(-3e4, 3e4).to(dtype)


def make_fma_exact():
    """Make the fused multiply-add of Triton's interpreter exact, which otherwise rounds the product.

    A float64 holds the product exactly and rounds the sum far below the last bit of a float32.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def check_quotients():
    """Check IEEE quotients of all bfloat16 mantissas with many divisors, and of random float32 pairs."""
    import triton
    import triton.language as tl

    @triton.jit
    def divide(a, d, out, IS_SHORT: tl.constexpr):
        at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
        divisor = tl.load(d + at)
        reciprocal = tl.div_rn(1.0, divisor)
        tl.store(out + at, nvfp4_triton._quotient(tl.load(a + at), divisor, reciprocal, IS_SHORT))

    generator = torch.Generator().manual_seed(0)
    short = (torch.arange(128).repeat(512) << 16 | 0x3F800000).to(torch.int32).view(torch.float32)
    for a, is_short in ((short, True), (torch.rand(65536, generator=generator) + 1, False)):
        d = torch.rand(65536, generator=generator) * 2.0 ** torch.randint(-60, 15, (65536,), generator=generator)
        out = torch.empty(65536)
        divide[(16,)](a, d, out, IS_SHORT=is_short)
        assert torch.equal(out, a / d)


def check_extreme_scales():
    """Check global scales inside and outside the range where reciprocals replace divisions, each with block amaxes from
    zero to infinity."""
    for exponent in (-100, -65, -64, -63, -20, 6, 7, 8, 40):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(48, 64, generator=torch.Generator().manual_seed(exponent + 200))
            x *= 2.0 ** (exponent + torch.arange(-36.0, 12.0)[:, None])
            x[3, :16], x[4, 5], x[5, 20] = 0.0, -0.0, torch.inf
            x, scale = x.to(dtype), torch.tensor(1.3 * 2.0**exponent)
            reference = nvfp4.fake_quant(x.float(), scale, check=False)
            reference = truncated(reference) if dtype == torch.bfloat16 else reference
            assert nvfp4_triton.fake_quant_(x, scale, "max").tolist() == [1] and same(x, reference), (exponent, dtype)


def interpret():
    make_fma_exact()
    check_quotients()
    check_extreme_scales()
    for rule in KERNEL_RULES:
        for dtype in (torch.float32,) if rule == "mse" else (torch.float32, torch.float16, torch.bfloat16):
            x = made(70, 128, dtype, seed=1)  # 560 blocks: two full tiles and a partial one
            scale = nvfp4.global_scale_from_amax(tensor_amax(x), rule=rule)
            reference = expected(x, scale, rule)
            bad = nvfp4_triton.fake_quant_(x, scale, rule)
            assert bad.tolist() == [0] and same(x, reference), (rule, dtype)

        if rule == "mse":  # the list kernel differs only in the lookup of its tensors
            continue
        shapes = ((3, 64), (0, 16), (2, 100, 64), (64, 96), (0, 32))
        weights = [made(*shape, torch.float32, i) if len(shape) == 2 and shape[0] > 2 else torch.randn(shape)
                   for i, shape in enumerate(shapes)]  # fmt: skip
        weights += [made(20, 16, torch.bfloat16, 9), made(300, 32, torch.float16, 10)]
        weights.append(torch.randn(33)[1:].view(2, 16))  # its address is not a multiple of 16
        amaxes = nvfp4_triton.amax_list(weights)
        assert torch.equal(amaxes, torch.stack([tensor_amax(weight) for weight in weights]))
        scales = nvfp4.global_scale_from_amax(amaxes, name=[str(i) for i in range(len(weights))], rule=rule)
        reference = [expected(weight, scale, rule) for weight, scale in zip(weights, scales, strict=True)]
        bad = nvfp4_triton.fake_quant_list_(weights, scales, rule)
        assert not bad.any() and all(same(a, b) for a, b in zip(weights, reference, strict=True)), rule

    damaged = [torch.randn(40, 128) for _ in range(3)]
    damaged[1][3, 5], damaged[1][30, 100], damaged[2][0, 0] = torch.nan, torch.inf, -torch.inf
    assert nvfp4_triton.amax_list(damaged).isfinite().tolist() == [True, False, False]
    assert nvfp4_triton.fake_quant_list_([w.clone() for w in damaged], torch.ones(3), "max").tolist() == [0, 2, 1]
    assert nvfp4_triton.fake_quant_(damaged[1], torch.ones(1), "max").tolist() == [2]
    assert nvfp4_triton.amax_list([torch.tensor([1.0, -3.5, 2.0])]).tolist() == [3.5]  # not a multiple of 16

    check_dispatch()


def check_dispatch():
    """Check the public functions, with the kernels enabled for CPU tensors."""
    nvfp4.triton_serves = nvfp4_multi_tensor.triton_serves = lambda x: True
    launched = []
    kernel = nvfp4_triton.fake_quant_
    nvfp4_triton.fake_quant_ = lambda *args: launched.append(1) or kernel(*args)
    x = made(20, 32, torch.float32, 3)
    scale = nvfp4.global_scale_from_amax(tensor_amax(x))
    packed = nvfp4.quantize(x, scale)  # always PyTorch
    assert torch.equal(nvfp4.fake_quant(x, scale), nvfp4.dequantize(*packed, scale)) and launched == [1]
    nvfp4.fake_quant(x, scale, rule="mse_sweep")  # a rule without a kernel
    assert launched == [1]
    view = made(32, 20, torch.float32, 4)[:, :16].t()  # [16, 32], strided, so it is copied
    reference = nvfp4.dequantize(*nvfp4.quantize(view, scale), scale)
    assert torch.equal(nvfp4.fake_quant_(view, scale), reference) and launched == [1, 1]
    names = ["a.w", "b.w", "c.w"]
    weights = [torch.randn(4, 32) for _ in names]
    weights[1][2, 3] = torch.nan
    assert_raises(
        lambda: nvfp4_multi_tensor.global_scales_from_amaxes(nvfp4_multi_tensor.amax_list(weights), names),
        r"^b\.w: amax is nan",
    )
    assert_raises(
        lambda: nvfp4_multi_tensor.fake_quant_list_(weights, torch.ones(3), names), r"^b\.w: 1 blocks hold NaN or Inf"
    )
    assert_raises(lambda: nvfp4.fake_quant(weights[1], torch.ones(()), name="b.w"), r"^b\.w: 1 blocks hold NaN or Inf")
    assert_raises(
        lambda: nvfp4_multi_tensor.fake_quant_list_(weights, torch.tensor([1.0, 1.0, 0.0]), names),
        r"^c\.w: global scale",
    )
    assert_raises(
        lambda: nvfp4_multi_tensor.fake_quant_list_([torch.ones(2, 8)], torch.ones(1), ["d.w"]), r"^d\.w: shape"
    )


def assert_raises(call, pattern):
    try:
        call()
    except QADError as error:
        assert re.search(pattern, str(error)), (pattern, str(error))
    else:
        raise AssertionError(pattern)


def compile_for_gpus():
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    table = {"table": "*i64", "length": "i32"}
    constants = {"STEPS": 13, "TYPE": tl.bfloat16, "ALIGNED": True}
    for capability in (90, 100):
        for rule in KERNEL_RULES[:2] if capability == 90 else ("max",):
            ptx = _ptx(
                nvfp4_triton._fake_quant_list_kernel,
                {**table, "scales": "*fp32", "bad": "*i32"},
                {**constants, "RULE": rule, "TILE": nvfp4_triton._NUM_BLOCKS},
                (triton, ASTSource, GPUTarget("cuda", capability, 32)),
            )
            assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx
            assert ".ftz" not in ptx  # subnormals are kept
            assert not re.search(r"\b(mul|add|sub)\.f32", ptx)  # without .rn, which ptxas may fuse
            # The only fused operations are the two of each rounding, whose products are exact, and those of quotients.
            fused = re.findall(r"fma\.rn\.f32.*", ptx)  # in pairs for sm_100
            assert fused and (rule == "max" or all(re.search("0f[4C][9A]C00000", line) for line in fused))
            assert re.search(r"ld\.global\.v4\.b32", ptx) and re.search(r"st\.global\.v4\.b32", ptx)  # 16 bytes each
    for kind in ("*fp32", "*fp16"):
        _ptx(
            nvfp4_triton._fake_quant_kernel,
            {"x_pointer": kind, "scale_pointer": "*fp32", "bad_pointer": "*i32", "num_blocks": "i32"},
            {"RULE": "max", "TILE": nvfp4_triton._NUM_BLOCKS},
            (triton, ASTSource, GPUTarget("cuda", 90, 32)),
        )
    ptx = _ptx(
        nvfp4_triton._amax_list_kernel,
        {**table, "out": "*i32"},
        {**constants, "TILE": 4096},
        (triton, ASTSource, GPUTarget("cuda", 90, 32)),
    )
    assert re.search(r"ld\.global\.v4\.b32", ptx)


def _ptx(kernel, signature, constants, compiler):
    triton, source, target = compiler
    signature = signature | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        source(fn=kernel, signature=signature, constexprs=constants),
        target=target,
        options=nvfp4_triton._LAUNCH,
    )
    return compiled.asm["ptx"]


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]]()
    print("passed")
