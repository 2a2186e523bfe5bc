"""--config FILE: YAML options become flags; an unknown key suggests the nearest valid one."""

import argparse
import dataclasses

import pytest

from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.yaml_file import expand, to_flags
from megatron_qad.engine import QADError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--train-iters", type=int, default=1)
    parser.add_argument("--seq_length", type=int)  # some of Megatron's flags have underscores
    parser.add_argument("--lr", type=float)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-rope-fusion", dest="rope_fusion", action="store_false")
    parser.add_argument("--log-progress", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--split", type=str)
    return parser


@pytest.fixture
def parse(parser, tmp_path):
    def parse(text: str, *flags: str) -> argparse.Namespace:
        file = tmp_path / "job.yaml"
        file.write_text(text)
        return parser.parse_args(expand(["--config", str(file), *flags], parser))

    return parse


def test_keys_with_dashes_or_underscores(parse):
    args = parse("train-iters: 7\nseq_length: 32\n")
    assert (args.train_iters, args.seq_length) == (7, 32)
    assert parse("train_iters: 8\n").train_iters == 8


def test_values_of_every_kind(parse):
    args = parse("lr: 5.0e-5\nbf16: true\ndata-path: [0.5, a, 0.5, b]\nsplit: 90,10,0\nno-rope-fusion: true\n")
    assert args.lr == 5e-5 and args.bf16 is True and args.rope_fusion is False
    assert args.data_path == ["0.5", "a", "0.5", "b"] and args.split == "90,10,0"


def test_false_and_null_leave_the_default(parse):
    args = parse("bf16: false\ntrain-iters: null\nno-rope-fusion: false\n")
    assert args.bf16 is False and args.train_iters == 1 and args.rope_fusion is True


def test_negated_options(parse):
    assert parse("log-progress: true\n").log_progress is True
    assert parse("no-log-progress: true\n", "--log-progress").log_progress is True


def test_negative_numbers_and_exponents_without_a_decimal_point(parse):
    """YAML reads 5e-5 as a string, which argparse converts to a number. A minus sign is not read as a flag."""
    assert parse("lr: 5e-5\n").lr == 5e-5
    assert parse("lr: -0.5\n").lr == -0.5


def test_flags_override_a_file_in_any_order(parse, parser, tmp_path):
    assert parse("train-iters: 7\nlr: 1.0\n", "--train-iters", "9").train_iters == 9
    file = tmp_path / "job.yaml"
    args = parser.parse_args(expand(["--train-iters", "9", "--config", str(file)], parser))
    assert (args.train_iters, args.lr) == (9, 1.0)


def test_later_file_wins(parser, tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.yaml").write_text(f"lr: {value}\nbf16: true\n")
    argv = [f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml"]
    assert parser.parse_args(expand(argv, parser)).lr == 2.0


def test_without_config_flags_are_unchanged(parser):
    assert expand(["--lr", "1"], parser) == ["--lr", "1"]


@pytest.mark.parametrize(
    "key, nearest", [("train-iter", "train-iters"), ("trian_iters", "train-iters"), ("seq-lenght", "seq_length")]
)
def test_unknown_key_suggests_the_nearest(parse, key, nearest):
    with pytest.raises(QADError, match=rf"job\.yaml: unknown key '{key}'; did you mean '{nearest}'\?"):
        parse(f"{key}: 3\n")


def test_unknown_key_without_a_similar_one(parse):
    with pytest.raises(QADError, match="unknown key 'zzzzzz'$"):
        parse("zzzzzz: 3\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("bf16: 1\n", "bf16: 1: expected true or false"),
        ("bf16: [true]\n", "bf16: .*: expected true or false"),
        ("lr: [1, 2]\n", "lr: .*: expected one value, not a list"),
        ("lr: {max: 1}\n", "lr: .*: expected a value or a list of values"),
        ("data-path: [[a]]\n", "data-path: .*: expected a value or a list of values"),
    ],
)
def test_values_of_the_wrong_form_are_rejected(parse, text, message):
    with pytest.raises(QADError, match=rf"job\.yaml: {message}"):
        parse(text)


@pytest.mark.parametrize(
    "text, message", [("- a\n", "expected a mapping.*found list"), ("", "found NoneType"), ("a: [}", "not valid YAML")]
)
def test_invalid_yaml_is_rejected(parse, text, message):
    with pytest.raises(QADError, match=message):
        parse(text)


def test_missing_file_is_rejected(parser, tmp_path):
    with pytest.raises(QADError, match=r"--config .*none\.yaml: no such file"):
        expand(["--config", str(tmp_path / "none.yaml")], parser)


def test_to_flags():
    options = {"a": 1, "b": True, "c": False, "d": None, "e": "x", "f": 0}
    assert to_flags(options) == ["--a", "1", "--b", "--e", "x", "--f", "0"]


def test_all_options_start_with_qad_and_have_a_default():
    fields = dataclasses.fields(QADOptions)
    assert all(field.name.startswith("qad_") for field in fields)
    QADOptions()
