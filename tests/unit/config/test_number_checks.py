"""Numbers of flags: the ranges contain every default, and values outside of them are rejected."""

import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_qad.config.number_checks import _RANGES, Range, check_numbers
from megatron_qad.engine import QADError, init_runtime

init_runtime()

from megatron_qad.config.qad_options import QADOptions  # noqa: E402
from megatron_qad.engine.megatron_args import make_parser  # noqa: E402


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_parser(QADOptions)


def test_ranges_are_of_existing_flags_and_contain_their_defaults(parser):
    """A typo in the table would check nothing."""
    defaults = {action.dest: action.default for action in parser._actions}
    assert not set(_RANGES) - set(defaults)
    for name, valid in _RANGES.items():
        default = defaults[name]
        assert not isinstance(default, int | float) or valid.contains(default), name
    check_numbers(parser.parse_args([]), parser)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_number_must_be_finite(parser, value):
    """All of Megatron's flags that take a float, not only those of the table."""
    flags = [action for action in parser._actions if action.type is float and action.nargs is None]
    assert len(flags) > 80
    for action in flags:
        option = action.option_strings[0]
        with pytest.raises(QADError) as error:
            check_numbers(parser.parse_args([f"{option}={value}"]), parser)
        assert str(error.value) == f"{option} {value}: expected a finite number."


def test_lists_are_checked(parser):
    check_numbers(parser.parse_args(["--iterations-to-skip", "1", "7"]), parser)
    with pytest.raises(QADError, match="--iterations-to-skip 0: expected a number of 1 or more"):
        check_numbers(parser.parse_args(["--iterations-to-skip", "7", "0"]), parser)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-5, 5), st.floats(0, 5))
def test_range(value, lower, width):
    upper = lower + width
    assert Range(lower).contains(value) == (value >= lower)
    assert Range(lower, excludes_lower=True).contains(value) == (value > lower)
    assert Range(lower, upper).contains(value) == (lower <= value <= upper)
    assert Range(lower, upper, excludes_upper=True).contains(value) == (lower <= value < upper)
    assert not Range(lower, upper).contains(math.nextafter(upper, math.inf))
