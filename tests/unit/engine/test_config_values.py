"""Typed values of config.json: what is right passes unchanged, everything else is one error with key and value."""

import math

import pytest

from megatron_qad.engine import QADError
from megatron_qad.engine import config_values as values


def error_of(read, *args, **kwargs) -> str:
    with pytest.raises(QADError) as raised:
        read(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize("value", ["4096", 120.0, 120.5, True, [120], {"a": 1}, 0, -1, 2**24 + 1, 10**400, math.nan])
def test_integer_refuses_other_types_and_sizes(value):
    message = error_of(values.integer, {"vocab_size": value}, "vocab_size")
    assert message.startswith("config.json: vocab_size is ")
    assert message.endswith(", expected an integer from 1 to 16,777,216.") and len(message) < 250


@pytest.mark.parametrize("value", ["1e-5", True, math.nan, math.inf, -math.inf, 10**400, [1], 0, -1e-5, 1.5])
def test_number_refuses_other_types_and_ranges(value):
    message = error_of(values.number, {"rms_norm_eps": value}, "rms_norm_eps", above=0, maximum=1)
    assert message.startswith("config.json: rms_norm_eps is ")
    assert message.endswith("expected a number above 0 and at most 1.")


@pytest.mark.parametrize("value", ["true", 1, 0, [], 1.0])
def test_flag_takes_booleans_only(value):
    assert "expected true or false" in error_of(values.flag, {"tie": value}, "tie", False)


def test_values_pass_unchanged():
    config = {"n": 3, "x": 1e-5, "whole": 2, "tie": True, "kind": "a", "list": [1, 2], "part": {"n": 1}}
    assert (values.integer(config, "n"), values.number(config, "x"), values.number(config, "whole")) == (3, 1e-5, 2)
    assert (values.flag(config, "tie"), values.text(config, "kind")) == (True, "a")
    assert (values.items(config, "list", int), values.section(config, "part")) == ([1, 2], {"n": 1})


def test_missing_and_null_take_the_default_or_are_named():
    assert values.integer({}, "n", 7) == values.integer({"n": None}, "n", 7) == 7
    assert values.integer({}, "n", None) is None and values.section({}, "part", None) is None
    assert error_of(values.integer, {}, "n") == "config.json: no 'n', which is required."
    assert error_of(values.number, {"n": None}, "n") == "config.json: no 'n', which is required. Found null."


def test_errors_name_the_place():
    config = {"llm_config": {"n": "1"}, "blocks": [{"n": 1}, {"n": 0}], "kinds": ["a", 1], "part": [1], "act": "x"}
    assert "config.json: llm_config: n is" in error_of(values.integer, values.section(config, "llm_config"), "n")
    blocks = values.entries(config, "blocks")
    assert values.integer(blocks[0], "n") == 1
    assert "config.json: blocks[1]: n is 0" in error_of(values.integer, blocks[1], "n")
    assert "kinds[1] is 1, expected one of a list of strings" in error_of(values.items, config, "kinds", str)
    assert "part is the list [1], expected an object" in error_of(values.section, config, "part")
    with_defaults = values.with_defaults(values.section(config, "llm_config"), {"m": 0, "n": 2})
    assert with_defaults == {"m": 0, "n": "1"} and values.place(with_defaults) == "config.json: llm_config"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"torch_dtype": "auto"}, "torch_dtype is the text 'auto', expected bfloat16 or float16"),
        ({"dtype": "bf16"}, "dtype is the text 'bf16'"),
        ({"dtype": "float8_e4m3fn"}, "dtype is the text 'float8_e4m3fn'"),
        ({"dtype": "int64"}, "dtype is the text 'int64'"),
        ({"dtype": "load"}, "dtype is the text 'load'"),
        ({"dtype": 16}, "dtype is 16, expected text"),
        ({"dtype": ["bfloat16"]}, "dtype is the list"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "dtype bfloat16 and torch_dtype float32 differ"),
    ],
)
def test_dtypes_that_no_weights_have(config, message):
    assert message in error_of(values.dtype_name, config)


def test_dtypes_of_weights():
    assert values.dtype_name({"torch_dtype": "torch.float16"}) == "float16"
    assert values.dtype_name({"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert values.dtype_name({"dtype": None}) is values.dtype_name({}) is None
