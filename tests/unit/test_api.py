"""The public names: they exist, and they refuse wrong options before anything is read."""

import inspect

import pytest

from megatron_qad import api
from megatron_qad.engine.errors import QADError


def test_every_public_name_is_documented():
    assert dir(api) == sorted(api.__all__)
    for name in api.__all__:
        assert inspect.getdoc(getattr(api, name)), name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        api.train  # noqa: B018


def test_wrong_options(tmp_path):
    with pytest.raises(QADError, match="unknown option 'seq_length', expected one of inputs"):
        api.prepare_data(["a.txt"], "tokenizer", str(tmp_path / "data"), seq_length=8)
    with pytest.raises(QADError, match="dtype is 'int4'"):
        api.import_hf(tmp_path, tmp_path / "out", dtype="int4")
