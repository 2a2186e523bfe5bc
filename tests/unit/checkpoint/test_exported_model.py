"""Scales that are recovered from stored reciprocals. tests/dist/test_evaluate.py compares whole models."""

from functools import partial

import pytest
import torch

from megatron_qad.checkpoint.exported_model import ExportedModel, scale_of_reciprocal
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.nvfp4_format import NVFP4


@pytest.mark.parametrize("kind", ["input", *("max", "four_over_six")])
def test_scale_of_every_bfloat16_amax_is_recovered_from_its_reciprocal(kind):
    rules = [partial(NVFP4.scale_from_amax, rule=rule) for rule in NVFP4.scale_rules]
    rules = [NVFP4.input_scale_from_amax] if kind == "input" else rules
    rule = rules[0] if kind == "input" else partial(NVFP4.scale_from_amax, rule=kind)
    inexact = 0
    for amax in (2.0**exponent * (1 + step / 128) for exponent in (-9, 0, 5) for step in range(128)):
        scale = rule(torch.tensor(amax))
        reciprocal = 1.0 / scale
        inexact += int(not torch.equal(1.0 / reciprocal, scale))
        assert torch.equal(scale_of_reciprocal(reciprocal, rules), scale), amax
    assert inexact > 20  # otherwise the test would not need the search


def test_other_reciprocals_are_inverted():
    reciprocal = torch.tensor(3.0001)
    assert torch.equal(scale_of_reciprocal(reciprocal, [NVFP4.input_scale_from_amax]), 1 / reciprocal)


def test_invalid_directory_is_refused_with_its_first_issue(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(QADError, match="issues?, the first: .*List all of them: megatron-qad validate"):
        ExportedModel.open(tmp_path)
