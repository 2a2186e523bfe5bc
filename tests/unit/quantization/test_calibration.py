"""Tests of percentile calibration and of the fallback amaxes of experts with few tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine import QADError
from megatron_qad.quantization.activations import MIN_EXPERT_TOKENS as MIN_TOKENS
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.calibration import MagnitudeCounts, make_calibrator, percentile_amax
from megatron_qad.quantization.names import sibling_experts


def collect_counts(*batches) -> torch.Tensor:
    calibrator = make_calibrator("percentile")
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
    calibrator = MagnitudeCounts()
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


EXPERT = "decoder.layers.{}.mlp.experts.experts.{}.{}"


def test_siblings_are_the_same_linear_in_all_experts_of_a_layer():
    names = [EXPERT.format(layer, i, fc) for layer in (1, 3) for i in (0, 1, 12) for fc in ("linear_fc1", "linear_fc2")]
    names.append("decoder.layers.1.mlp.shared_experts.linear_fc1")
    siblings = sibling_experts(names)
    assert siblings[names[0]] == [EXPERT.format(1, i, "linear_fc1") for i in (0, 1, 12)]
    assert siblings.keys() == set(names[:-1])


class OneRank:
    """Expert-parallel process group of a single rank."""

    def rank(self):
        return 0


@pytest.fixture
def experts(make_chunk):
    """Function that returns a chunk with one layer of three experts, one linear each, and the linears' names."""

    def make():
        chunk = make_chunk((32, 32))
        layer = chunk.decoder.layers[0]
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.Module()
        layer.mlp.experts.ep_group, layer.mlp.experts.num_local_experts = OneRank(), 3
        layer.mlp.experts.local_experts = torch.nn.ModuleList()
        for _ in range(3):
            expert = torch.nn.Module()
            expert.linear_fc1 = torch.nn.Linear(32, 16, bias=False)
            layer.mlp.experts.local_experts.append(expert)
        return chunk, [EXPERT.format(0, i, "linear_fc1") for i in range(3)]

    return make


@pytest.mark.parametrize("percentile", [None, 99.0])
def test_expert_without_tokens_takes_the_largest_sibling_amax(experts, percentile):
    chunk, names = experts()
    quantizers = ActivationQuantizers([chunk], {f"{n}.weight": "nvfp4" for n in names}, percentile=percentile)
    with quantizers.calibrating():
        for i, size in ((0, 1.0), (2, 3.0)):
            chunk.decoder.layers[0].mlp.experts.local_experts[i].linear_fc1(torch.full((MIN_TOKENS, 32), size))
        chunk.decoder.layers[0].mlp.experts.local_experts[1].linear_fc1(torch.ones(0, 32))  # as Megatron does
    assert [quantizers.quantizers[n]._amax.item() for n in names] == [1.0, 3.0, 3.0]
    assert quantizers.fallbacks == {names[1]: (names[2], 0)} and quantizers.calibrated
    # A later calibration with tokens for this expert removes the fallback.
    with quantizers.calibrating():
        for i in range(3):
            chunk.decoder.layers[0].mlp.experts.local_experts[i].linear_fc1(torch.full((MIN_TOKENS, 32), 1.0 + i))
    assert [quantizers.quantizers[n]._amax.item() for n in names] == [1.0, 2.0, 3.0] and not quantizers.fallbacks


@pytest.mark.parametrize(("own_amax", "expected"), [(1.0, 2.0), (5.0, 5.0)])
def test_expert_with_few_tokens_takes_a_larger_sibling_amax(experts, own_amax, expected):
    chunk, names = experts()
    quantizers = ActivationQuantizers([chunk], {f"{n}.weight": "nvfp4" for n in names})
    with quantizers.calibrating():
        for i, (rows, size) in enumerate(((MIN_TOKENS - 1, own_amax), (MIN_TOKENS, 2.0), (MIN_TOKENS, 1.5))):
            chunk.decoder.layers[0].mlp.experts.local_experts[i].linear_fc1(torch.full((rows, 32), size))
    assert [quantizers.quantizers[n]._amax.item() for n in names] == [expected, 2.0, 1.5]
    assert quantizers.fallbacks == ({names[0]: (names[1], MIN_TOKENS - 1)} if expected > own_amax else {})


def test_error_if_no_expert_received_tokens(experts):
    chunk, names = experts()
    quantizers = ActivationQuantizers([chunk], {f"{n}.weight": "nvfp4" for n in names})
    message = (
        r"experts\.0\.linear_fc1 has amax 0\.0.*every expert of its layer.*'decoder\.layers\.0\.mlp\.experts\.\*=bf16'"
    )
    with pytest.raises(QADError, match=message), quantizers.calibrating():
        pass


def test_dead_expert_takes_the_largest_sibling_amax(experts):
    """An expert that received many tokens, all zeros, as the second linear of an expert behind a dead ReLU does."""
    chunk, names = experts()
    quantizers = ActivationQuantizers([chunk], {f"{n}.weight": "nvfp4" for n in names})
    with quantizers.calibrating():
        for i, size in enumerate((0.0, 2.0, 1.5)):
            chunk.decoder.layers[0].mlp.experts.local_experts[i].linear_fc1(torch.full((2 * MIN_TOKENS, 32), size))
    assert [quantizers.quantizers[n]._amax.item() for n in names] == [2.0, 2.0, 1.5]
    assert quantizers.fallbacks == {names[0]: (names[1], 2 * MIN_TOKENS)}
