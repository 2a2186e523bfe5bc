"""Finds exports in the compressed-tensors layout that transformers would load wrongly, and makes it refuse them.

Found with transformers 5.14.1 and compressed-tensors 0.20 (tests/unit/checkpoint/test_transformers_support.py says when
that changes): experts in NVFP4 are decompressed without their global scale, and the model computes garbage without an
error (transformers issue 48371). The packed tensors of Nemotron-H are not found. vLLM reads all of these exports.
"""

from collections.abc import Mapping
from typing import Any

from megatron_qad.checkpoint.expected_tensors import inventory
from megatron_qad.checkpoint.layouts import COMPRESSED_TENSORS, LayoutName

WEIGHTS_KEY = "transformers_weights"
"""Key of config.json that names the file from which transformers reads the weights. No server reads it."""
_EXPERTS_READ = "pack-quantized"
"""The only compressed-tensors format whose experts transformers decompresses correctly."""


def transformers_problem(config: Mapping[str, Any], layout: LayoutName, formats: Mapping[str, str]) -> str | None:
    """Return why transformers cannot compute with an export, as a phrase without a period, or None if it can.

    Args:
        config: contents of config.json.
        formats: format of each quantized linear, by module name.
    """
    if layout != COMPRESSED_TENSORS.name:
        return None  # transformers refuses the modelopt layout by itself
    if config.get("model_type") == "nemotron_h":
        return "transformers does not find the packed weights of Nemotron-H"
    if config.get("model_type") == "qwen3_moe":
        experts = {module for group in inventory(dict(config)).experts for module in group}
        algos = {COMPRESSED_TENSORS.stored(fmt).algo for module, fmt in formats.items() if module in experts}
        if algos - {_EXPERTS_READ}:
            return "transformers decompresses its experts without their scales and would compute garbage"
    return None


def refused_by_transformers(config: dict[str, Any], problem: str | None) -> dict[str, Any]:
    """Return ``config`` with an entry at which transformers stops, if there is a ``problem``.

    transformers raises a ValueError that quotes the entry, because it is not the name of a weight file. Without a
    problem the entry is absent: it named a file of the source model.
    """
    config = {key: value for key, value in config.items() if key != WEIGHTS_KEY}
    return config if problem is None else config | {WEIGHTS_KEY: f"this export is for vLLM: {problem}"}
