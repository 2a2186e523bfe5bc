"""Runs the code of docs/howto/add_a_family.md step by step."""

from dataclasses import replace
from functools import partial

import pytest
import tiny_configs
from guides import code_of, run

from megatron_qad.checkpoint.expected_tensors import EXPECTED_TENSORS, inventory
from megatron_qad.engine import QADError
from megatron_qad.models.families import FAMILIES, dense_decoder, family_of
from megatron_qad.quantization.policy import load, resolve

CODE = code_of("add_a_family.md")
CONFIG = eval(CODE["tests/tiny_configs.py"], vars(tiny_configs).copy())
"""Step 5."""


class Module:
    """A module with the code of one block of the page."""

    def __init__(self, file: str):
        vars(self).update(run(CODE[file], file))


@pytest.fixture
def registered(monkeypatch):
    """Steps 1 and 2."""
    acme = Module("megatron_qad/models/families/acme.py")
    family = eval(CODE["megatron_qad/models/families/__init__.py"], {"acme": acme})
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    return family


@pytest.fixture
def expected(monkeypatch):
    """Steps 3 and 4."""
    acme = Module("megatron_qad/checkpoint/expected_tensors/acme.py")
    for model_type, function in eval(
        CODE["megatron_qad/checkpoint/expected_tensors/__init__.py"], {"acme": acme}
    ).items():
        monkeypatch.setitem(EXPECTED_TENSORS, model_type, function)


def test_family_is_unknown_before_step_2():
    with pytest.raises(QADError, match="'AcmeForCausalLM' .* is not supported. .* nearest is LlamaForCausalLM"):
        family_of(CONFIG)


def test_config_becomes_megatron_options(registered):
    options = family_of(CONFIG).megatron_args(CONFIG)
    llama = tiny_configs.TINY_LLAMA
    llama_options = family_of(llama).megatron_args(llama)
    assert options == llama_options | {"add-qkv-bias": True, "qk-layernorm": True} != llama_options
    assert (options["hybrid-layer-pattern"], options["hidden-size"], options["kv-channels"]) == ("*-*-*-", 64, 32)
    with pytest.raises(QADError, match="acme_scale 30.0 is not supported"):
        registered.megatron_args(CONFIG | {"acme_scale": 30.0})
    with pytest.raises(QADError, match="acme_scale is the text '1'"):
        registered.megatron_args(CONFIG | {"acme_scale": "1"})
    with pytest.raises(QADError, match="no 'hidden_size', which is required"):
        registered.megatron_args(CONFIG | {"hidden_size": None})


def test_name_map_round_trips(registered, assert_round_trip):
    assert_round_trip(CONFIG)
    names = {name for tensor in registered.tensors(CONFIG) for name in tensor.hf}
    assert {"model.layers.2.self_attn.k_proj.bias", "model.layers.0.self_attn.q_norm.weight"} < names
    assert len({tensor.megatron for tensor in registered.tensors(CONFIG)}) == len(registered.tensors(CONFIG))


def test_validator_does_not_know_it_before_step_4(registered):
    with pytest.raises(QADError, match="model_type is 'acme'.*docs/howto/add_a_family.md"):
        inventory(CONFIG)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied head"])
def test_expected_tensors_match_name_map(registered, expected, assert_same_tensors, changes):
    assert_same_tensors(CONFIG | changes)


@pytest.mark.parametrize(("forgotten", "qk_norm"), [("bias", True), ("norm", False)])
def test_mistake_in_name_map_is_detected(registered, expected, assert_same_tensors, monkeypatch, forgotten, qk_norm):
    """The comparison of two independent lists reports a tensor that one of them lacks."""
    wrong = partial(dense_decoder.tensors, qkv_bias=forgotten != "bias", qk_norm=qk_norm)
    monkeypatch.setitem(FAMILIES, registered.architecture, replace(registered, tensors=wrong))
    with pytest.raises(AssertionError, match=forgotten):
        assert_same_tensors(CONFIG)


def test_policies_resolve(registered):
    """The policy quantizes every linear of the decoder, and neither the head nor the norms."""
    linears = registered.linears(CONFIG)
    formats = resolve(load("nvfp4-all-linear", ["attention=fp8"]), linears, registered.layer_kinds(CONFIG))
    assert set(formats) == {linear.megatron for linear in linears} and len(linears) == 4 * 3 + 1
    by_kind = {linear.kind: formats[linear.megatron] for linear in linears}
    assert by_kind == {"attention": "fp8", "mlp": "nvfp4", "head": "bf16"}
