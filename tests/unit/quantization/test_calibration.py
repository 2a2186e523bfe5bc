"""Tests of percentile calibration and of the amax that the experts of a layer share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.calibration import (
    MagnitudeCounts,
    largest_over_experts,
    percentile_amax,
)


def collect_counts(*batches) -> torch.Tensor:
    calibrator = MagnitudeCounts(50.0)
    for x in batches:
        calibrator.collect(x)
    return calibrator.counts


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), percentile=st.sampled_from([0.1, 50.0, 90.0, 99.0, 99.9, 100.0]))
def test_bfloat16_percentile_matches_sorted_magnitudes(seed, percentile):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 401, generator=generator) * torch.rand(3, 401, generator=generator) ** 8).bfloat16()
    magnitudes = x.abs().flatten().sort().values
    magnitudes = magnitudes[magnitudes > 0]
    num_covered = -(-len(magnitudes) * percentile // 100)  # at least this many
    amax = percentile_amax(collect_counts(x), percentile)
    assert amax.item() == magnitudes[max(int(num_covered), 1) - 1].item()


def test_float32_magnitudes_round_up_to_bfloat16():
    x = torch.tensor([1.0, 1.0 + 2**-20, -3.14159])
    assert percentile_amax(collect_counts(x), 34.0).item() == 1 + 2**-7  # covers the second value
    assert percentile_amax(collect_counts(x), 100.0).item() >= 3.14159


def test_zeros_are_not_counted():
    x = torch.cat([torch.zeros(1000), torch.tensor([1.0, 2.0])])
    assert percentile_amax(collect_counts(x), 50.0).item() == 1.0
    assert percentile_amax(collect_counts(torch.zeros(5)), 50.0).item() == 0.0


def test_counts_do_not_depend_on_order_or_sharding():
    batches = [torch.randn(64, generator=torch.Generator().manual_seed(s)).bfloat16() * 2**s for s in range(5)]
    together = collect_counts(*batches)
    assert torch.equal(together, collect_counts(*reversed(batches)))
    assert torch.equal(together, sum(collect_counts(x) for x in batches))


def test_maximum_with_counts_keeps_nan():
    calibrator = MagnitudeCounts(50.0)
    calibrator.collect(torch.tensor([1.0, float("nan")]))
    calibrator.collect(torch.tensor([2.0]))
    assert calibrator.compute_amax().isnan()


def test_percentile_excludes_outliers_and_100_is_the_maximum(make_chunk, linears):
    name = "decoder.layers.0.linear"
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[7, 7] = 1000.0
    amaxes = {}
    for percentile in (None, 100.0, 99.0):
        chunk = make_chunk(dtype=torch.bfloat16)
        quantizers = ActivationQuantizers([chunk], {f"{name}.weight": "nvfp4"}, percentile=percentile)
        with quantizers.calibrating():
            linears(chunk)[0](x)
        amaxes[percentile] = quantizers.quantizers[name]._amax.item()
    assert amaxes[None] == amaxes[100.0] == 1000.0 and 2.0 < amaxes[99.0] < 4.0


EXPERTS = "decoder.layers.0.mlp.experts.experts.*.linear_fc1"


@pytest.mark.parametrize("percentile", [None, 99.0])
def test_experts_share_one_amax(experts, percentile):
    """It is that of the tokens of all experts, as if they were one linear; an expert without tokens needs none."""
    chunk, linear, formats = experts()
    quantizers = ActivationQuantizers([chunk], formats, percentile=percentile)
    assert list(quantizers.quantizers) == [EXPERTS]
    x = torch.randn(90, 32, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    x[50:] *= 8  # tokens of the third expert
    with quantizers.calibrating():
        linear(x[:20], [20, 0, 0])
        linear(x[:0], [0, 0, 0])
        linear(x[20:], [30, 0, 40])
    expected = x.abs().max() if percentile is None else percentile_amax(collect_counts(x), percentile)
    assert quantizers.quantizers[EXPERTS]._amax.item() == expected.item() and quantizers.calibrated
    scale = NVFP4.input_scale_from_amax(expected)
    output, _ = linear(x[48:52], [2, 0, 2])
    quantized = nvfp4.fake_quant(x[48:52], scale)
    assert torch.equal(output, torch.cat([quantized[:2] @ linear.weight[0].t(), quantized[2:] @ linear.weight[2].t()]))


@pytest.mark.parametrize("tokens", [[0, 0, 0], [2, 1, 1]])
def test_error_if_all_experts_are_dead(experts, tokens):
    """No token of the layer, or only zeros, as the second linears of experts behind dead ReLUs receive."""
    chunk, linear, formats = experts()
    quantizers = ActivationQuantizers([chunk], formats)
    message = (
        r"experts\.\*\.linear_fc1 has amax 0\.0.*no expert of its layer.*'decoder\.layers\.0\.mlp\.experts\.\*=bf16'"
    )
    with pytest.raises(QADError, match=message), quantizers.calibrating():
        linear(torch.zeros(sum(tokens), 32), tokens)


def test_using_other_formats_of_experts(experts):
    chunk, linear, formats = experts()
    quantizers = ActivationQuantizers([chunk], formats)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    with quantizers.calibrating():
        unquantized, _ = linear(x, [3, 3, 3])
    quantized, _ = linear(x, [3, 3, 3])
    quantizers.use({})
    assert torch.equal(linear(x, [3, 3, 3])[0], unquantized) and not torch.equal(quantized, unquantized)
    quantizers.use(formats)
    assert torch.equal(linear(x, [3, 3, 3])[0], quantized)


def test_amaxes_of_experts_calibrated_alone_become_their_maximum():
    """As in checkpoints of older versions. Layers, projections and other linears keep their own."""
    layer = "decoder.layers.{}.mlp.experts.experts.{}.linear_fc{}.input_quantizer._amax"
    amaxes = {
        layer.format(n, i, fc): torch.tensor([n + 10.0 * i + 100 * fc])
        for n in (1, 3)
        for i in (0, 12, 2)
        for fc in (1, 2)
    }
    amaxes["decoder.layers.1.mlp.shared_experts.linear_fc1.input_quantizer._amax"] = torch.tensor([7.0])
    shared = {name: amax.item() for name, amax in largest_over_experts(amaxes).items()}
    expected = {layer.format(n, i, fc): n + 120.0 + 100 * fc for n in (1, 3) for i in (0, 12, 2) for fc in (1, 2)}
    assert shared == expected | {"decoder.layers.1.mlp.shared_experts.linear_fc1.input_quantizer._amax": 7.0}
