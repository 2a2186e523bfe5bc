"""Reads the blends that ``--data-path`` and similar flags give: prefixes with or without weights, for each split.

Megatron would take a mistyped weight for a prefix, use negative weights, and stop with an assertion at others.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json, read_text

Blend = tuple[list[str], list[float] | None]
"""Prefixes, and their weights or None."""
SPLITS = ("train", "valid", "test")
_FLAGS = ("data_path", "data_args_path", "per_split_data_args_path", *(f"{split}_data_path" for split in SPLITS))


def read_blends(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """Return Megatron's ``blend`` (one for all splits) and ``blend_per_split``; at least one of the two is None.

    Raises:
        QADError: flags that exclude each other, weights that are not finite numbers above 0, weights for some prefixes
            only, an unreadable file.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in _FLAGS}
    given = [name for name in flags if getattr(args, name) is not None]
    if len(given) > 1 and not all(name.startswith(SPLITS) for name in given):
        raise QADError(f"{' and '.join(flags[name] for name in given)} both give data. Give one of them.")
    if args.data_path is not None:
        return parse_blend(args.data_path, "--data-path"), None
    if args.data_args_path is not None:
        entries = read_text(Path(args.data_args_path)).split()
        return parse_blend(entries, f"--data-args-path {args.data_args_path}"), None
    if args.per_split_data_args_path is not None:
        return None, _read_per_split(args.per_split_data_args_path)
    blends = [parse_blend(getattr(args, name), flags[name]) for name in _FLAGS[-len(SPLITS) :]]
    return None, blends if any(blends) else None


def _read_per_split(path: str) -> list[Blend | None]:
    name, content = f"--per-split-data-args-path {path}", read_json(Path(path))
    if wrong := [key for key in content if key not in SPLITS]:
        raise QADError(f"{name}: unknown key {wrong[0]!r}. Expected {', '.join(SPLITS)}.")
    blends = []
    for split in SPLITS:
        entries = content.get(split)
        if isinstance(entries, str):
            entries = entries.split()
        if entries is not None and not (isinstance(entries, list) and all(isinstance(x, str) for x in entries)):
            raise QADError(f"{name}: '{split}' is {json.dumps(entries)}. Expected a list of strings, or a string.")
        blends.append(parse_blend(entries, f"{name}, '{split}'"))
    return blends


def parse_blend(entries: Sequence[str] | None, name: str) -> Blend | None:
    """Return the blend of a flag's values: prefixes, or "WEIGHT PREFIX" pairs. None if there are no values.

    Args:
        name: start of the error, such as ``--data-path``.

    Raises:
        QADError: a weight that is not a finite number above 0, or weights for some prefixes only.
    """
    entries = [entry.strip() for entry in entries or ()]
    if not entries:
        return None
    weights = [_number(entry) for entry in entries[::2]]
    if len(entries) % 2 or None in weights:
        numbers = [x for x in entries if _number(x) is not None and not Path(f"{x}.idx").exists()]
        if numbers:
            raise QADError(
                f"{name}: {numbers[0]} of the {len(entries)} values {' '.join(entries)} is a number. Expected "
                "prefixes, or pairs 'WEIGHT PREFIX' with a weight for every prefix."
            )
        return entries, None
    prefixes = entries[1::2]
    for weight, text, prefix in zip(weights, entries[::2], prefixes, strict=True):
        if not 0 < weight < math.inf:
            raise QADError(
                f"{name}: the weight of {prefix} is {text}. Expected a finite number above 0; leave out data that "
                "should not be read."
            )
    return prefixes, weights


def parse_split(split: str | None) -> list[float]:
    """Return the shares of the training, validation and test documents in ``--split``; they sum to 1.

    Raises:
        QADError: not one to three decimal numbers of 0 or more, or a sum of 0.
    """
    # Megatron would ignore a sign, and read 1e-3 as two numbers.
    parts = re.split(r"[,\s]+", (split or "").strip())
    shares = [float(part) for part in parts if re.fullmatch(r"\d+\.?\d*|\.\d+", part)]
    if len(shares) != len(parts) or len(shares) > len(SPLITS) or not 0 < sum(shares) < math.inf:
        raise QADError(
            f"--split {split!r}: expected the shares of training, validation and test, such as 99,1,0: up to three "
            "decimal numbers of 0 or more that are not all 0."
        )
    return [share / sum(shares) for share in shares] + [0.0] * (len(SPLITS) - len(shares))


def notes(blend: Blend | None, per_split: Sequence[Blend | None] | None) -> list[str]:
    """Return sentences on data that is given more than once: within a blend, or for training and validation."""
    lines = []
    for prefixes, weights in filter(None, [blend, *(per_split or ())]):
        for path, count in Counter(map(_resolve, prefixes)).items():
            if count > 1:
                effect = "its weights add up" if weights else f"its documents are read {count} times per epoch"
                lines.append(f"{path} is given {count} times in one blend: {effect}")
    train, valid, _ = per_split or (None, None, None)
    if train and valid:
        lines += [
            f"{path} is given for training and for validation: the validation measures text that was trained on"
            for path in sorted({_resolve(p) for p in train[0]} & {_resolve(p) for p in valid[0]})
        ]
    return lines


def _resolve(prefix: str) -> str:
    return str(Path(f"{prefix}.bin").resolve()).removesuffix(".bin")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
