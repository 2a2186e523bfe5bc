"""Bytes that layers keep, computed by hand. tests/dist/test_saved_activations.py compares them with counted ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_configs import TINY_LLAMA

from megatron_qad.models.families import family_of
from megatron_qad.planning.activations import LOCAL, LOCAL_GPU, TE, Saved, saved_by_layers
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.schedule import activation_bytes

CONFIG = json.loads((Path(__file__).parents[1] / "quantization/configs/nemotron-3-nano-30b-a3b.json").read_text())
NANO = PlannedModel(family_of(CONFIG), CONFIG)
DENSE = PlannedModel(family_of(TINY_LLAMA), TINY_LLAMA)
S, H = 64, 64
LAYOUT = Layout(seq_length=S)


def test_local_layers_of_a_dense_model():
    attention, mlp = saved_by_layers(DENSE, LAYOUT, LOCAL)[:2]
    norm = S * (8 * H + 4)
    # Input, cosines and sines, query, key, the whole output with the value, output with its softmax sums. The
    # projection is not quantized, and its input is that output.
    query, key = 2 * 4 * 32, 2 * 2 * 32
    core = S * (2 * H + 4 * 2 * 32 + query + key + (query + 2 * key) + query + 4 * 4)
    assert attention == Saved(norm + core)
    assert mlp == Saved(norm + S * 2 * (H + 3 * 96))


def test_te_keeps_two_inputs_of_a_norm_and_linear():
    _, mlp = saved_by_layers(DENSE, LAYOUT, TE)[:2]
    assert mlp == Saved(S * (2 * 2 * H + 4) + S * 2 * 3 * 96)


@pytest.mark.parametrize("kernels", [LOCAL, LOCAL_GPU, TE])
def test_sharding_divides_what_layers_keep(kernels):
    """Sequence and context parallelism divide everything but small parts: masks, cosines and sines, routing."""
    whole = sum(saved.kept for saved in saved_by_layers(NANO, replace(LAYOUT, seq_length=4096), kernels))
    for sizes in ({"tp": 2, "sequence_parallel": True}, {"cp": 2}):
        part = sum(s.kept for s in saved_by_layers(NANO, replace(LAYOUT, seq_length=4096, **sizes), kernels))
        assert whole / 2 <= part < 0.56 * whole, sizes


def test_fused_kernels_keep_less():
    kept = [
        sum(s.kept for s in saved_by_layers(NANO, replace(LAYOUT, seq_length=4096), k)) for k in (LOCAL, LOCAL_GPU, TE)
    ]
    assert kept[0] > kept[1] >= kept[2]


def test_recomputation_keeps_inputs_of_layers():
    """All inputs and, while the last layer runs again, what it keeps; attention needs more than the MLP before it."""
    layers = saved_by_layers(DENSE, LAYOUT, LOCAL)
    one_input = 2 * S * H
    (full,) = activation_bytes(DENSE, replace(LAYOUT, recompute="full"), LOCAL)
    assert full == max(
        len(layers) * one_input + layers[-1].kept,
        (len(layers) - 1) * one_input + layers[-2].kept,
        len(layers) * one_input + S * (8 * H + 4),
    )
    (block,) = activation_bytes(
        DENSE, replace(LAYOUT, recompute="full", recompute_layers=2, recompute_block=True), LOCAL
    )
    assert block == 2 * one_input + sum(layer.kept for layer in layers[2:]) + S * (8 * H + 4)


def test_first_stage_holds_more_microbatches():
    first, second = activation_bytes(NANO, Layout(pp=2, seq_length=512, global_batch_size=8), LOCAL)
    assert first > 1.5 * second
