"""Block scales, codes and global scales equal modelopt's, bit for bit, from its calibration to its export.

modelopt's fake quantization with static block scales is a Triton kernel that needs a GPU. Here a PyTorch function takes
its place, and a test compares the two in Triton's interpreter. Everything else is modelopt's own code.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_qad.formats.nvfp4_format import NVFP4

RECIPES = {  # the algorithm of modelopt's recipes, and the quantizer's flag
    "four_over_six": ({"method": "mse", "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}, True),
    "mse_multipliers": ({"method": "mse"}, False),
    "mse_sweep": ({"method": "mse", "fp8_scale_sweep": True}, False),
    "local_hessian": ({"method": "local_hessian"}, False),
}
COLUMNS = 64
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def made(kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, COLUMNS, generator=generator)
    if kind == "heavy-tailed":
        x /= torch.randn(24, COLUMNS, generator=generator).abs().clamp(min=1e-3)
    if kind == "tied":  # multiples of an eighth, and an amax of 12, so that quotients are halfway between codes
        x = torch.randint(-96, 97, (24, COLUMNS), generator=generator) / 8
        x[0, 0] = 12.0
        x[3] = torch.randint(-2, 3, (COLUMNS,), generator=generator)  # few values: candidates with equal errors
        x[4] = 3.0
    if kind == "zero blocks":
        x[::2], x[1, :16] = 0.0, -0.0
    if kind == "one block":
        x = x[:1, :16]
    if kind == "near ties":
        x = near_ties()
    if kind == "small blocks":  # block scales that are subnormal or underflow
        x *= 2.0 ** -torch.arange(24.0).unsqueeze(1)
    if kind == "small tensor":  # modelopt's search replaces an amax below 2e-7 by 1
        x *= 2.0**-23
    return x * (0.02 if kind == "normal" else 1.0)


# Seed and index of blocks for which another order of additions makes another choice between 6 and 4, as it does for one
# of a million. ``near_ties`` makes them.
NEAR_TIES = ((1, 26649), (2, 29530), (5, 98565), (12, 17437))

KINDS = ("near ties", "normal", "heavy-tailed", "tied", "zero blocks", "one block", "small blocks", "small tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def near_ties() -> torch.Tensor:
    rows = [torch.full((16,), 4.5)]
    for seed, index in NEAR_TIES:
        blocks = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(seed))
        rows.append(blocks[index].bfloat16().float())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("triton")
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel

    return fp4_kernel


def fake_quantized(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Do what modelopt's kernel does to blocks [B, 16] with the decoding scales [B, 1]: E2M1, ties to even."""
    scaled = x.abs() / torch.where(scale == 0, 1.0, scale)
    above_a_tie_to_even = sum((scaled == bound) for bound in BOUNDS[1::2].tolist())
    magnitude = VALUES[torch.bucketize(scaled, BOUNDS) + above_a_tie_to_even] * scale
    return torch.where(x >= 0, magnitude, -magnitude)


@pytest.fixture
def modelopt_on_cpu(kernel, monkeypatch):
    """modelopt, with ``fake_quantized`` instead of its kernel."""
    from modelopt.torch.quantization import tensor_quant

    def static_blockwise_fp4_fake_quant(x, amax, global_amax, quantize_block_scales, fp8_max, out_dtype):
        assert x.dtype == out_dtype == torch.float32 and quantize_block_scales
        scale = kernel.compute_fp4_scales(amax, global_amax, True, fp8_max)
        return fake_quantized(x.view(amax.numel(), -1), scale.view(-1, 1)).view_as(x)

    gemm = tensor_quant.triton_kernel
    monkeypatch.setattr(gemm, "IS_AVAILABLE", True)
    monkeypatch.setattr(gemm, "static_blockwise_fp4_fake_quant", static_blockwise_fp4_fake_quant, raising=False)


def quantized_by_modelopt(weights: list[torch.Tensor], inputs: list[torch.Tensor], rule: str) -> list[tuple]:
    """Return modelopt's exported codes, block scales and global scale of each weight."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import get_weight_scaling_factor, get_weight_scaling_factor_2
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    model = torch.nn.ModuleList(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    for linear, weight in zip(model, weights, strict=True):
        linear.weight.data.copy_(weight)
    algorithm, four_over_six = RECIPES[rule]
    blocks = {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": four_over_six}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (2, 1), "block_sizes": blocks}, "enable": True},
        ],
        "algorithm": algorithm,
    }
    mtq.quantize(model, config, lambda _: [linear(x) for linear, x in zip(model, inputs, strict=True)])
    results = []
    for linear in model:
        block_scale, scale = get_weight_scaling_factor(linear), get_weight_scaling_factor_2(linear)
        packed = NVFP4QTensor.quantize(linear.weight.data.clone(), 16, block_scale, scale)[0]._quantized_data
        results.append((packed, block_scale, scale))
    return results


@pytest.mark.parametrize("rule", RECIPES)
def test_codes_and_scales_equal_modelopt(rule, modelopt_on_cpu):
    cases = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    weights = [made(kind).to(dtype) for kind, dtype in cases]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(50, w.shape[1], generator=generator).to(w.dtype) for w in weights]
    theirs = quantized_by_modelopt(weights, inputs, rule)
    for (kind, dtype), weight, x, (packed, block_scale, scale) in zip(cases, weights, inputs, theirs, strict=True):
        amax = weight.abs().amax().float()
        ours = NVFP4.scale_from_amax(amax, rule=rule)
        hessian = second_moments(x) if rule == "local_hessian" else None
        scales = NVFP4.block_scales(weight, ours, rule=rule, amax=amax, hessian=hessian)
        codes = NVFP4.quantize_fixed(weight, ours, scales)["weight"]
        where = (kind, dtype)
        assert torch.equal(ours, scale), where
        assert torch.equal(scales.view(torch.uint8), block_scale.view(torch.uint8)), where
        assert torch.equal(codes, packed), where
        if dtype != torch.float32 and rule != "local_hessian":  # training gets the same without being told the amax
            trained = NVFP4.quantize(weight, ours, rule=rule)
            assert torch.equal(trained["weight"], packed), where
            assert torch.equal(trained["block_scale"].view(torch.uint8), block_scale.view(torch.uint8)), where
        if rule == "four_over_six":  # in the block with the amax, for which E4M3 is exact
            assert block_scale.float().view(-1)[weight.abs().argmax() // 16] in (256, 384), where


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of x x^T over tokens for each block of 16 columns, in the order of modelopt's product."""
    blocks = x.float().T.reshape(-1, 16, len(x))
    return (blocks @ blocks.transpose(-1, -2)) / len(x)


def test_function_in_place_of_the_kernel_equals_it(kernel, monkeypatch):
    from modelopt.torch.kernels.quantization.common import nvfp4_quant
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(nvfp4_quant, "libdevice", SimpleNamespace(isnan=lambda x: x != x))  # CUDA's has no interpreter
    for module, name in (
        (nvfp4_quant, "fp4_round_magnitude"),
        (nvfp4_quant, "nvfp4_scalar_quant"),
        (kernel, "static_blockwise_fp4_fake_quant_kernel"),
    ):
        monkeypatch.setattr(module, name, InterpretedFunction(getattr(module, name).fn))
    monkeypatch.setattr(kernel, "nvfp4_scalar_quant", nvfp4_quant.nvfp4_scalar_quant)
    # The kernel takes blocks of any size, and its interpreter needs milliseconds for each.
    scale = torch.tensor([[0.0], [1.0], [0.37], [2.0**-130], [3e-9]])
    ties = torch.cat([BOUNDS, -BOUNDS, VALUES, torch.tensor([-0.0, 7.0, -7.0, 1e30])])
    x = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0)) * 3
    x[:, : len(ties)] = ties
    x *= torch.where(scale == 0, 1.0, scale)
    out = torch.empty_like(x)
    kernel.static_blockwise_fp4_fake_quant_kernel[(5,)](
        x, out, scale, 5, BLOCK_SIZE=4096, OUT_DTYPE=kernel._torch_dtype_to_tl(torch.float32)
    )
    assert torch.equal(out, fake_quantized(x, scale))  # 0.0 equals -0.0, which has no effect on an error
