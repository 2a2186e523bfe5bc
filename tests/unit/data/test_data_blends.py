"""Values of --data-path and --split: weights, pairs, repeated data."""

import argparse

import pytest

from megatron_qad.data.blends import notes, parse_blend, parse_split, read_blends
from megatron_qad.engine.errors import QADError


def given(**flags) -> argparse.Namespace:
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    return argparse.Namespace(**(dict.fromkeys((*names, "per_split_data_args_path")) | flags))


@pytest.mark.parametrize(
    "values, blend",
    [
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["2", "a"], (["a"], [2.0])),
        (["0.3", "a", " 7e-1", "b "], (["a", "b"], [0.3, 0.7])),
        ([], None),
        (None, None),
    ],
)
def test_prefixes_and_pairs(values, blend):
    assert parse_blend(values, "--data-path") == blend


@pytest.mark.parametrize("weight", ["-0.5", "nan", "inf", "-inf", "0", "0.0", "1e999"])
def test_weight_that_is_not_above_zero_is_an_error(weight):
    with pytest.raises(QADError, match=f"^--data-path: the weight of b is {weight}. Expected a finite number above 0"):
        parse_blend(["1", "a", weight, "b"], "--data-path")


@pytest.mark.parametrize(
    "values, number",
    [
        (["0.5", "a", "b"], "0.5"),
        (["0.5", "a", "0.5"], "0.5"),
        (["a", "1", "b", "2"], "1"),
        (["1", "a", "b", "c"], "1"),
    ],
)
def test_weights_for_some_prefixes_only_are_an_error(values, number, tmp_path, monkeypatch):
    with pytest.raises(QADError, match=rf"^--data-path: {number} of the {len(values)} values .* pairs 'WEIGHT PREFIX'"):
        parse_blend(values, "--data-path")
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{number}.idx").touch()
    if len(values) == 3 and values.count("0.5") == 1:  # a number may be the name of data
        assert parse_blend(values, "--data-path") == (values, None)


def test_blends_from_flags_and_files(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("0.5 a\n0.5 b\n")
    blend = (["a", "b"], [0.5, 0.5])
    assert read_blends(given(data_path=["0.5", "a", "0.5", "b"])) == (blend, None)
    assert read_blends(given(data_args_path=str(file))) == (blend, None)
    assert read_blends(given(train_data_path=["a"], test_data_path=[])) == (None, [(["a"], None), None, None])
    assert read_blends(given()) == (None, None)
    file.write_text('{"train": "0.5 a 0.5 b", "valid": ["c"]}')
    per_split = given(per_split_data_args_path=str(file))
    assert read_blends(per_split) == (None, [blend, (["c"], None), None])
    for text, message in (
        ('{"train": 5}', "'train' is 5. Expected a list of strings"),
        ('{"valdi": ["c"]}', "unknown key 'valdi'. Expected train, valid, test"),
        ('{"train": ["-1", "a"]}', "'train': the weight of a is -1"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(QADError, match=message):
            read_blends(per_split)
    file.unlink()
    for flags in (per_split, given(data_args_path=str(file))):
        with pytest.raises(QADError, match=r"data.txt: cannot be read \(No such file"):
            read_blends(flags)


@pytest.mark.parametrize(
    "text, shares", [("99,1,0", [0.99, 0.01, 0]), ("3 1", [0.75, 0.25, 0]), (".1, 0.1,0.2", [0.25, 0.25, 0.5])]
)
def test_split(text, shares):
    assert parse_split(text) == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize("text", ["-1,2,0", "0,0,0", "", "a,b", "1,2,3,4", "nan,1", "inf,1,0", "1;2", "1e-3,1,0"])
def test_split_that_megatron_would_misread_is_an_error(text):
    """Megatron reads -1 as 1, and 1e-3 as two numbers."""
    with pytest.raises(QADError, match=f"^--split '{text}': expected the shares of training, validation and test"):
        parse_split(text)


def test_notes_name_data_that_is_given_twice():
    assert notes((["a", "b"], None), None) == []
    (line,) = notes((["a", "./a"], None), None)
    assert line.endswith("/a is given 2 times in one blend: its documents are read 2 times per epoch")
    (line,) = notes((["a", "a"], [1.0, 2.0]), None)
    assert line.endswith("its weights add up")
    assert notes(None, [(["a"], None), (["b"], None), (["a"], None)]) == []
    (line,) = notes(None, [(["a", "b"], None), (["./b"], None), None])
    assert line.endswith(
        "/b is given for training and for validation: the validation measures text that was trained on"
    )
