"""Reads the numbers that megatron-qad sensitivity has written, for the run report."""

from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json


def read_sensitivity(path: str | Path) -> dict:
    """Return the contents of a sensitivity.json, given by its path or its directory.

    Raises:
        QADError: the file is missing or is not one.
    """
    file = Path(path) / "sensitivity.json" if Path(path).is_dir() else Path(path)
    document = read_json(file, "Give the --output of a complete megatron-qad sensitivity.")
    try:
        float(document["num_tokens"])
        for unit in document["units"]:
            if unit["format"] not in document["everything"] or not isinstance(unit["name"], str):
                raise KeyError(unit["format"])
            float(unit["kl"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise QADError(f"{file}: is not a result of megatron-qad sensitivity. Measure again.") from None
    return document
