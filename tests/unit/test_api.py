"""The public names: they exist, and they refuse wrong options before anything is read."""

import inspect
import tomllib
from pathlib import Path

import pytest

from megatron_qad import api
from megatron_qad.checkpoint.hf_writer import Written
from megatron_qad.checkpoint.validate import ValidationResult
from megatron_qad.engine.errors import QADError


def test_every_public_name_is_documented():
    assert dir(api) == sorted(api.__all__)
    for name in api.__all__:
        assert inspect.getdoc(getattr(api, name)), name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        api.train  # noqa: B018


def test_types_are_published_and_checked():
    """make lint runs mypy on the files of pyproject.toml: those that define what users import or get back."""
    root = Path(api.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    defining = {inspect.getsourcefile(getattr(api, name)) for name in api.__all__}
    defining |= {inspect.getsourcefile(result) for result in (Written, ValidationResult)}
    checked = set(settings["tool"]["mypy"]["files"])
    assert {str(Path(file).relative_to(root)) for file in defining} <= checked
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["megatron_qad"]
    assert (root / "megatron_qad/py.typed").is_file()


def test_wrong_options(tmp_path):
    with pytest.raises(QADError, match="unknown option 'seq_length', expected one of inputs"):
        api.prepare_data(["a.txt"], "tokenizer", str(tmp_path / "data"), seq_length=8)
    with pytest.raises(QADError, match="dtype is 'int4'"):
        api.import_hf(tmp_path, tmp_path / "out", dtype="int4")


def test_errors_name_arguments_instead_of_flags(tmp_path):
    """Flags of a recommended command keep their names."""
    text = tmp_path / "a.txt"
    text.write_text("a\n")
    with pytest.raises(QADError, match=r"^validation_fraction 2: expected a number above 0"):
        api.prepare_data([str(text)], "tokenizer", str(tmp_path / "data"), validation_fraction=2)
    with pytest.raises(QADError, match=r"^image_root without images: .*for a model only"):
        api.prepare_data([str(text)], "tokenizer", str(tmp_path / "data"), image_root=str(tmp_path))
    with (
        pytest.raises(QADError, match=r"^inputs x: run megatron-qad plan --gpus 8$"),
        api._arguments_instead_of_flags(input="inputs"),
    ):
        raise QADError("--input x: run megatron-qad plan --gpus 8")
