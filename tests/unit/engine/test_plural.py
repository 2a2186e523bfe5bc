"""Counts in sentences."""

from pathlib import Path

from megatron_qad.checkpoint.validate import ValidationResult
from megatron_qad.engine.plural import count


def test_one_is_singular():
    assert [count(n, "document") for n in (0, 1, 2)] == ["0 documents", "1 document", "2 documents"]


def test_summary_of_a_validation():
    result = ValidationResult(Path("DIR"), num_tensors=1, num_linears=1)
    result.add("weight", "is missing")
    assert result.summary().startswith("DIR: 1 issue; layout unknown, 1 tensor, 0 of 1 linear quantized")
    result.add("weight_scale", "is missing")
    assert result.summary().startswith("DIR: 2 issues; ")
