"""The amaxes from which an export's scales of inputs, keys and values were computed, in its ``calibration.json``.

The record is a file of its own, so that the stored scales can be checked: weights say nothing about them. It has the
amax of each quantized linear's input under "inputs", and those of an FP8 KV cache under "keys" and "values", all by the
Hugging Face names of the linears (q, k and v have the same input).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE
from megatron_qad.formats.format import NumberFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS

Record = dict[str, dict[str, float]]
_KEYS = ("inputs", "keys", "values")


def check_input_scales(
    directory: Path,
    layout: PackedLayout,
    model: Inventory,
    scalars: Mapping[str, Tensor],
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> bool:
    """Compare the stored scales of inputs, keys and values with ``calibration.json``, bit for bit.

    Args:
        scalars: per-tensor scales by name.
        quantized: format of each quantized linear.
        kv_cache: one of ``KV_CACHE_FORMATS``.
        issue: called for every issue.

    Returns:
        Whether the file exists. Exports of earlier versions do not have it.
    """
    file = directory / CALIBRATION_FILE
    if not file.is_file():
        return False
    try:
        record = _read(file)
    except QADError as error:
        issue(CALIBRATION_FILE, f"{str(error).removeprefix(f'{file}: ')}")
        return True

    def check(name: str, number: NumberFormat, key: str, module: str, is_reciprocal: bool) -> None:
        if (amax := record[key].get(module)) is None:
            issue(CALIBRATION_FILE, f"has no amax of {module} ({key}), from which {name} was computed")
        elif name in scalars:
            scale = number.input_scale_from_amax(torch.tensor(amax), name=name, check=False)
            expected, found = layout.store_scalar(scale, is_reciprocal=is_reciprocal), scalars[name]
            if found.numel() == 1 and found.item() != expected.item():
                issue(
                    name,
                    f"is {found.item()!r}, expected {expected.item()!r}, which {CALIBRATION_FILE} implies: the "
                    f"calibration's amax is {amax!r}",
                )

    for module, fmt in quantized.items():
        if (number := FORMATS[fmt].input) is not None:
            stored = layout.stored(fmt)
            check(f"{module}.{stored.parts['input_scale'][0]}", number, "inputs", module, stored.is_reciprocal)
    if (kv_format := KV_CACHE_FORMATS[kv_cache]) is not None:
        for pair in model.attentions:
            names = kv_format.scale_names(layout.name, *pair)
            for name, key, module in zip(names, _KEYS[1:], pair, strict=True):
                check(name, kv_format.number, key, module, is_reciprocal=False)
    return True


def _read(file: Path) -> Record:
    record: Any = json_records.read(file)
    for key in _KEYS:
        amaxes = record.get(key) if isinstance(record, dict) else None
        if not isinstance(amaxes, dict) or not all(type(amax) is float for amax in amaxes.values()):
            raise QADError(f"{file}: has no {key!r} with the amax of each linear. Export again.")
    return record
