"""Rotary embedding of config.json: the values are those of transformers, for every spelling that it reads."""

import copy

import pytest
import torch
from tiny_configs import TINY_LLAMA
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of
from megatron_qad.models.rope import llama3_inv_freq

FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = FACTORS | {"rope_type": "llama3"}
LENGTH = {"original_max_position_embeddings": 64}

SPELLINGS = {
    "transformers 5": {"rope_parameters": LLAMA3 | LENGTH | {"rope_theta": 500000.0}},
    "transformers 4": {"rope_scaling": LLAMA3 | LENGTH, "rope_theta": 500000.0},
    "theta at the top": {"rope_parameters": LLAMA3 | LENGTH, "rope_theta": 500000},
    "theta in both": {"rope_parameters": LLAMA3 | LENGTH | {"rope_theta": 500000.0}, "rope_theta": 10000.0},
    "no theta": {"rope_scaling": LLAMA3 | LENGTH},
    "type": {"rope_scaling": FACTORS | LENGTH | {"type": "llama3"}, "rope_theta": 500000.0},
    "type twice": {"rope_scaling": LLAMA3 | LENGTH | {"type": "llama3"}},
    "length at the top": {"rope_scaling": LLAMA3, "rope_theta": 500000.0} | LENGTH,
    "length at the top, transformers 5": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}} | LENGTH,
    "length in both": {"rope_scaling": LLAMA3 | LENGTH} | LENGTH,
    "no length": {"rope_scaling": LLAMA3, "max_position_embeddings": 256},
    "integers": {"rope_scaling": {**LLAMA3, **LENGTH, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
    "plain": {"rope_theta": 1e6},
    "plain, transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "nothing": {},
    "both are empty": {"rope_scaling": None, "rope_parameters": {}},
    "rope_scaling is empty": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}},
    "both are equal": {"rope_scaling": LLAMA3 | LENGTH, "rope_parameters": LLAMA3 | LENGTH},
    "whole head": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_values_are_those_of_transformers(name):
    config = TINY_LLAMA | SPELLINGS[name]
    theirs = LlamaConfig(**copy.deepcopy({key: value for key, value in config.items() if key != "model_type"}))
    family = family_of(config)
    theirs.standardize_rope_params()  # as the model does before it computes the frequencies
    rope = theirs.rope_parameters
    assert family.megatron_args(config)["rotary-base"] == rope["rope_theta"]
    ours = family.rope_scaling(config)
    if rope["rope_type"] == "default":
        assert ours is None
        return
    assert {key: rope[key] for key in ours} == ours
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device="cpu")
    # The same float32 operations except for the order of a product and a quotient: two roundings of 6e-8.
    torch.testing.assert_close(llama3_inv_freq(theirs.head_dim, ours["rope_theta"], ours), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": LLAMA3}, "rope_scaling: no 'original_max_position_embeddings'"),
        ({"rope_scaling": {"rope_type": "llama3"} | LENGTH}, "rope_scaling: no 'low_freq_factor'"),
        ({"rope_scaling": {"rope_type": "llama3"}} | FACTORS | LENGTH, "rope_scaling: no 'low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, **LENGTH, "factor": None}}, "no 'factor', which is required. Found null"),
        ({"rope_scaling": {**LLAMA3, **LENGTH, "factor": "8"}}, "factor is the text '8', expected a number above 0"),
        ({"rope_scaling": {**LLAMA3, **LENGTH, "factor": 0}}, "factor is 0, expected a number above 0"),
        ({"rope_scaling": {**LLAMA3, **LENGTH, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0, .* above 1"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.0}}, "is 64.0, expected an integer"),
        ({"rope_scaling": LLAMA3 | LENGTH, "original_max_position_embeddings": 128}, "is 64, but 128 at the top level"),
        ({"rope_scaling": LLAMA3 | LENGTH, "rope_parameters": {"rope_theta": 1e4}}, "differ, and loaders disagree"),
        ({"rope_scaling": LLAMA3 | LENGTH | {"type": "linear"}}, "rope_type 'llama3' and type 'linear' differ"),
        ({"rope_scaling": [LLAMA3]}, "rope_scaling is the list .*, expected an object"),
        ({"rope_scaling": "llama3"}, "rope_scaling is the text 'llama3', expected an object"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type is 3, expected text"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [8, 4, 4]}}, r"mrope_section \[8, 4, 4\]"),
        ({"rope_theta": "10000"}, "rope_theta is the text '10000', expected a number above 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": True}, "rope_theta is the boolean True"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"partial_rotary_factor": "1.0"}, "partial_rotary_factor is the text '1.0'"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope type '{kind}' is not supported")
            for kind in ("linear", "dynamic", "yarn", "longrope", "proportional", "mrope", "su", "")
        ),
    ],
)
def test_incomplete_and_unsupported_rope_is_refused_at_import(changes, message):
    config = TINY_LLAMA | changes
    with pytest.raises(QADError, match=message):
        family_of(config).megatron_args(config)
