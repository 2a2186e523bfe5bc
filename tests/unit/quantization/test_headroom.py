"""Tests of calibration with headroom, against modelopt's calibrator, and of constant amaxes of the KV cache."""

import warnings

import pytest
import torch
from modelopt.torch.quantization import calib

from megatron_qad.engine import QADError
from megatron_qad.formats import fp8
from megatron_qad.formats.input_scales import round_up_to_bf16
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.headroom import BlockAmaxCounts, headroom_amax

NAME = "decoder.layers.0.linear"


def inputs(kind: str, seed: int) -> torch.Tensor:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    if kind == "outlier":
        x[3, 5] = 3e4
    elif kind == "wide":  # blocks differ by 2^36
        x *= torch.exp2(torch.linspace(-18, 18, 40)).bfloat16().view(-1, 1)
    elif kind == "sparse":
        x[::2] = 0.0
    return x


@pytest.mark.parametrize("rho", [64.0, 16384.0])
@pytest.mark.parametrize("kind", ["normal", "outlier", "wide", "sparse"])
def test_amax_equals_that_of_modelopt(kind, rho):
    """Except that ours is rounded up to bfloat16, as checkpoints store it."""
    if not hasattr(calib, "NVFP4ActHeadroomCalibrator"):
        pytest.skip("modelopt has this calibrator since 0.47")
    peer, ours = calib.NVFP4ActHeadroomCalibrator(rho=rho), BlockAmaxCounts(rho)
    for seed in range(3):
        for calibrator in (peer, ours):
            calibrator.collect(inputs(kind, seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = peer.compute_amax()
    amax, warning = ours.amax_of_counts(ours.counts, ours.compute_amax())
    assert torch.equal(amax, round_up_to_bf16(expected))
    assert (warning is not None) == bool(caught) == (kind in ("wide", "outlier"))
    assert torch.equal(amax.bfloat16().float(), amax)


def test_counts_of_ranks_add_up_where_the_maximum_of_results_does_not():
    """modelopt takes the largest result of the ranks. One rank with few small blocks then decides for all."""
    parts = [inputs("normal", 0), inputs("normal", 1) * 2**-6]
    together, apart = BlockAmaxCounts(1000.0), []
    for part in parts:
        alone = BlockAmaxCounts(1000.0)
        for calibrator in (alone, together):
            calibrator.collect(part)
        apart.append(alone)
    counts = sum(calibrator.counts for calibrator in apart)
    assert torch.equal(counts, together.counts)
    maximum = together.compute_amax()
    reduced = headroom_amax(counts, maximum, 1000.0)[0]
    results = [headroom_amax(calibrator.counts, maximum, 1000.0)[0] for calibrator in apart]
    assert reduced < max(results) / 32


def test_job_calibrates_nvfp4_inputs_with_headroom_and_others_with_the_maximum(make_chunk, linears):
    formats = {f"{NAME}.weight": "nvfp4", "decoder.layers.1.linear.weight": "fp8"}
    chunk = make_chunk(dtype=torch.bfloat16)
    quantizers = ActivationQuantizers([chunk], formats, headroom=16384.0)
    x = inputs("normal", 0)[:, :32]
    with quantizers.calibrating():
        hidden = linears(chunk)[0](x)
        linears(chunk)[1](hidden)
    expected = BlockAmaxCounts(16384.0)
    expected.collect(x)
    amax = quantizers.quantizers[NAME].amax
    assert amax.item() == headroom_amax(expected.counts, expected.compute_amax(), 16384.0)[0].item()
    assert amax > 100 * x.abs().max()
    assert quantizers.quantizers["decoder.layers.1.linear"].amax.item() == hidden.abs().max().item()


@pytest.mark.parametrize("value, amax", [(float("nan"), "inf"), (0.0, "0.0")])
def test_inputs_without_usable_blocks_are_errors(make_chunk, linears, value, amax):
    chunk = make_chunk(dtype=torch.bfloat16)
    quantizers = ActivationQuantizers([chunk], {f"{NAME}.weight": "nvfp4"}, headroom=16384.0)
    with pytest.raises(QADError, match=f"the input of {NAME} has amax {amax}"), quantizers.calibrating():
        linears(chunk)[0](torch.full((2, 32), value).bfloat16())


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.stack([key, value])


def test_cast_kv_cache_is_never_calibrated(make_chunk):
    """Not even by a checkpoint of a run with calibrated scales; keys and values are rounded to E4M3 as they are."""
    chunk = make_chunk()
    layer = chunk.decoder.layers[0]
    layer.self_attention = torch.nn.Module()
    layer.self_attention.core_attention = Attention()
    quantizers = ActivationQuantizers([chunk], {}, kv_cache="fp8_cast")
    assert len(quantizers.quantizers) == 2 and quantizers.calibrated
    key, value = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * 100
    expected = torch.stack([fp8.fake_quant(x, torch.tensor(1.0)) for x in (key, value)])

    def attend():
        return layer.self_attention.core_attention(key, key, value)

    assert torch.equal(attend(), expected)
    with quantizers.calibrating():
        assert torch.equal(attend(), torch.stack([key, value]))
    assert torch.equal(attend(), expected)
    quantizers.expect_amax()
    for quantizer in quantizers.quantizers.values():
        quantizer._amax = torch.tensor(3.0)  # as loaded
    assert quantizers.calibrated and torch.equal(attend(), expected)
    assert {quantizer.amax.item() for quantizer in quantizers.quantizers.values()} == {448.0}
