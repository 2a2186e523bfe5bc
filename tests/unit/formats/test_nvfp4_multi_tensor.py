"""Operations on lists of tensors on the CPU: equality with a loop, and errors that name the tensor."""

import pytest
import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_multi_tensor import amax_list, fake_quant_list_, global_scales_from_amaxes

NAMES = ["a.weight", "b.weight", "c.weight"]


def weights():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(5, 32, generator=generator),
        torch.randn(2, 3, 16, generator=generator).bfloat16() * 7,  # experts
        torch.zeros(4, 16, dtype=torch.float16),
    ]


@pytest.mark.parametrize("rule", ["max", "four_over_six", "mse", "mse_sweep"])
def test_each_tensor_is_quantized_in_place_with_its_own_scale(rule):
    tensors = weights()
    amaxes = amax_list(tensors)
    assert amaxes.dtype == torch.float32 and amaxes.tolist() == [float(w.abs().amax()) for w in tensors]
    scales = global_scales_from_amaxes(amaxes, NAMES, rule)
    assert scales.tolist() == [nvfp4.global_scale_from_amax(amax, rule=rule).item() for amax in amaxes]
    expected = [nvfp4.fake_quant(w, s, rule=rule) for w, s in zip(tensors, scales, strict=True)]
    addresses = [w.data_ptr() for w in tensors]
    fake_quant_list_(tensors, scales, NAMES, rule)
    assert addresses == [w.data_ptr() for w in tensors]
    assert all(torch.equal(w, e) for w, e in zip(tensors, expected, strict=True))


def test_errors_name_tensor():
    tensors = weights()
    tensors[1][1, 2, 3] = torch.nan
    with pytest.raises(QADError, match=r"^b\.weight: amax is nan, expected"):
        global_scales_from_amaxes(amax_list(tensors), NAMES)
    with pytest.raises(QADError, match=r"^b\.weight: 1 of 96 values"):
        fake_quant_list_(tensors, torch.ones(3), NAMES)
    with pytest.raises(QADError, match=r"^c\.weight: global scale is 0"):
        fake_quant_list_(weights(), torch.tensor([1.0, 1.0, 0.0]), NAMES)
    with pytest.raises(QADError, match="2 names or scales for 3 tensors"):
        fake_quant_list_(weights(), torch.ones(2), NAMES)
    amaxes = torch.full((10,), torch.inf)
    with pytest.raises(QADError, match=r"w0: amax is inf; .*w7: amax is inf and 2 more"):
        global_scales_from_amaxes(amaxes, [f"w{i}" for i in range(10)])


def test_empty_list():
    assert amax_list([]).shape == (0,)
    fake_quant_list_([], torch.zeros(0), [])
    assert global_scales_from_amaxes(torch.zeros(0), []).shape == (0,)
