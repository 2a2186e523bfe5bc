"""Triton kernels on a GPU against the PyTorch reference on the CPU, bit for bit, for all dtypes and scale rules."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_qad.engine import QADError, capabilities
from megatron_qad.formats import nvfp4
from megatron_qad.formats.block_scales import KERNEL_RULES
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.nvfp4_multi_tensor import amax_list, fake_quant_list_, global_scales_from_amaxes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from nvfp4_values import differing_values, hard_values  # noqa: E402

nvfp4_triton = pytest.importorskip("megatron_qad.formats.nvfp4_triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(capabilities().device != "cuda", reason="needs a GPU: kernels are compared on it")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(ours, reference):
    assert differing_values(ours, reference) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", KERNEL_RULES)
@pytest.mark.parametrize("exponent", [-110, -40, -8, 0])
def test_fake_quant_equals_reference_bitwise(dtype, rule, exponent):
    for seed, (rows, dim) in enumerate([(64, 4096), (3, 16), (77, 208), (1000, 1024)]):
        x = hard_values(rows, dim, dtype, seed, exponent)
        scale = nvfp4.global_scale_from_amax(tensor_amax(x), rule=rule)
        on_gpu = nvfp4.fake_quant(x.cuda(), scale.cuda(), rule=rule)
        assert_same_bits(on_gpu, nvfp4.fake_quant(x, scale, rule=rule))


def test_torch_path_on_gpu_equals_cpu_bitwise(monkeypatch):
    monkeypatch.setattr(nvfp4, "triton_serves", lambda x: False)
    for rule in ("max", "four_over_six", "mse", "mse_multipliers", "mse_sweep"):
        x = hard_values(300, 512, torch.bfloat16, 1)
        scale = nvfp4.global_scale_from_amax(tensor_amax(x), rule=rule)
        assert_same_bits(nvfp4.fake_quant(x.cuda(), scale.cuda(), rule=rule), nvfp4.fake_quant(x, scale, rule=rule))
        packed, block_scale = nvfp4.quantize(x.cuda(), scale.cuda(), rule=rule)
        expected_packed, expected_scale = nvfp4.quantize(x, scale, rule=rule)
        assert torch.equal(packed.cpu(), expected_packed)
        assert torch.equal(block_scale.cpu().view(torch.uint8), expected_scale.view(torch.uint8))


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_list_is_quantized_in_place_with_one_launch_per_dtype(rule, monkeypatch):
    weights = [hard_values(8 + 13 * i, 16 * (1 + i % 5), DTYPES[i % 3], i) for i in range(300)]
    weights += [torch.zeros(0, 64), torch.zeros(4, 64, dtype=torch.bfloat16)]
    on_gpu = [w.cuda() for w in weights]
    base = torch.randn(16 * 64 + 1)
    weights.append(base[1:].view(16, 64))
    on_gpu.append(base.cuda()[1:].view(16, 64))  # not aligned to 16 bytes
    names = [f"w{i}" for i in range(len(weights))]
    amaxes = amax_list(on_gpu)
    assert torch.equal(amaxes.cpu(), torch.stack([tensor_amax(w) for w in weights]))
    scales = global_scales_from_amaxes(amaxes, names, rule)
    tables = []
    original = nvfp4_triton._tables
    monkeypatch.setattr(nvfp4_triton, "_tables", lambda tensors: tables.append(original(tensors)) or tables[-1])
    fake_quant_list_(on_gpu, scales, names, rule)
    assert len(tables) == 1 and len(tables[0]) == 3
    for ours, weight, scale in zip(on_gpu, weights, scales.cpu(), strict=True):
        assert_same_bits(ours, nvfp4.fake_quant(weight, scale, rule=rule))


def test_nan_and_inf_error_names_tensor():
    weights = [torch.randn(64, 64, device="cuda") for _ in range(3)]
    weights[1][3, 3], weights[2][5, 60] = torch.nan, -torch.inf
    names = ["a", "layers.1.w", "layers.2.w"]
    with pytest.raises(QADError, match=r"layers\.1\.w: amax is nan; layers\.2\.w: amax is inf"):
        global_scales_from_amaxes(amax_list(weights), names)
    with pytest.raises(QADError, match=r"layers\.1\.w: 1 blocks; layers\.2\.w: 1 blocks hold NaN or Inf"):
        fake_quant_list_(weights, torch.ones(3, device="cuda"), names)
    with pytest.raises(QADError, match=r"layers\.7\.w: 1 blocks hold NaN or Inf"):
        bad = torch.randn(4, 64, device="cuda")
        bad[0, 0] = torch.inf
        nvfp4.fake_quant_(bad, torch.ones((), device="cuda"), name="layers.7.w")


def test_tensor_with_more_than_2_to_the_31_values():
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda").view(-1, 4096)
    tail = torch.randn(1, 4096).bfloat16()
    x[-1:] = tail.cuda()
    scale = nvfp4.global_scale_from_amax(tensor_amax(tail))
    fake_quant_list_([x], scale.reshape(1).cuda(), ["large"])
    assert_same_bits(x[-1:], nvfp4.fake_quant(tail, scale))
    assert not x[:-1].any()
