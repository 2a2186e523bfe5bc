"""Compare the small files of an export with those of the model that training began from; called by ``validate``.

config.json and generation_config.json must have the same entries, except those that the exporter changes on purpose.
The tokenizer must load, and give the same ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.hf_directory import AddIssue, read_json
from megatron_qad.checkpoint.hf_reader import declared_dtype
from megatron_qad.data.bad_document import failures_are_bad_documents
from megatron_qad.data.tokenizer import PROBE, VOCABULARY_FILES
from megatron_qad.engine import text_files
from megatron_qad.engine.config_values import integer
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import check_json_files
from megatron_qad.engine.run_directory import manifest
from megatron_qad.models.families import family_of, text_config

_NOT_ARCHITECTURE = (
    *("quantization_config", "compression_config", "transformers_weights"),  # removed or written by the exporter
    *("torch_dtype", "dtype"),  # compared as what they declare
    *("transformers_version", "_name_or_path"),
)
_MISSING = "missing"
_NUM_PIECES = 200
"""Number of pieces of the vocabulary that are encoded, besides ``PROBE``."""
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def check_config_entries(config: dict[str, Any], original: Path, issue: AddIssue) -> None:
    """Report entries of config.json and generation_config.json that differ from the original's.

    Args:
        config: contents of the export's config.json.
        original: directory of the model that training began from.
    """
    expected = text_files.read_json(original / "config.json")
    if (architecture := family_of(expected).architecture) not in expected.get("architectures", ()):
        expected = expected | {"architectures": [architecture]}  # of a base model, whose export has a head
    for name, found, value in _differences(config, expected):
        issue("config.json", f"{name} is {found}, but {value} in {original}")
    try:
        dtype = declared_dtype(config)
    except QADError:
        return  # reported where the stored dtypes are checked
    if (expected_dtype := declared_dtype(expected)) not in (None, dtype):
        issue("config.json", f"dtype is {dtype}, but {expected_dtype} in {original}")


def check_generation_config(directory: Path, original: Path, issue: AddIssue) -> None:
    """Report entries of generation_config.json that differ from the original's."""
    name = "generation_config.json"
    expected = text_files.read_json(original / name) if (original / name).is_file() else None
    if not (directory / name).is_file():
        if expected is not None:
            issue(name, f"is missing, but {original} has one")
        return
    if (found := read_json(directory / name, issue)) is None:
        return
    for key, value, expected_value in _differences(found, expected or {}):
        issue(name, f"{key} is {value}, but {expected_value} in {original}")


def _differences(found: Any, expected: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (path of the entry, value found, value expected) of all entries that differ, at any depth."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        if type(found) is not type(expected) or found != expected:
            yield path, f"{found!r:.200}", f"{expected!r:.200}"
        return
    for key in dict.fromkeys([*expected, *found]):
        if key in _NOT_ARCHITECTURE:
            continue
        name = f"{path}.{key}" if path else key
        if key not in found:
            yield name, _MISSING, f"{expected[key]!r:.200}"
        elif key not in expected:
            yield name, f"{found[key]!r:.200}", _MISSING
        else:
            yield from _differences(found[key], expected[key], name)


def check_tokenizer(directory: Path, original: Path, issue: AddIssue) -> str | None:
    """Report a tokenizer that does not load, is larger than the vocabulary, or gives other ids than the original's.

    Returns:
        Why the tokenizers could not be loaded and only their files were compared, or None.
    """
    files = [name for name in VOCABULARY_FILES if (original / name).is_file()]
    if not files:
        return f"the tokenizer was not compared: {original} has none"
    try:
        expected = _load(original)
    except QADError as error:
        sums = [manifest.sum_of(original / name) for name in files]
        for name, value in zip(files, sums, strict=True):
            if not (directory / name).is_file() or manifest.sum_of(directory / name) != value:
                issue(name, f"is missing or differs from {original / name}")
        return f"the tokenizer's files were compared instead of its ids: {original}: {error}"
    try:
        found = _load(directory)
    except QADError as error:
        issue("tokenizer", f"does not load: {error}; that of {original} does")
        return None
    vocabulary, expected_vocabulary = found.get_vocab(), expected.get_vocab()
    num_rows = integer(text_config(text_files.read_json(original / "config.json")), "vocab_size")
    size, expected_size = (max(v.values(), default=-1) + 1 for v in (vocabulary, expected_vocabulary))
    if size > max(num_rows, expected_size):
        issue("tokenizer", f"has ids up to {size - 1}, but the model's vocabulary ends at {num_rows - 1}")
    pieces = vocabulary.keys() | expected_vocabulary.keys()
    if wrong := sorted(p for p in pieces if vocabulary.get(p) != expected_vocabulary.get(p)):
        piece = wrong[0]
        issue(
            "tokenizer",
            f"{piece!r} has the id {vocabulary.get(piece)}, but {expected_vocabulary.get(piece)} in {original} "
            f"({len(wrong)} pieces differ)",
        )
    for name in _SPECIAL:
        if getattr(found, name) != getattr(expected, name):
            issue("tokenizer", f"{name} is {getattr(found, name)}, but {getattr(expected, name)} in {original}")
    texts = [PROBE, *sorted(expected_vocabulary)[:: len(expected_vocabulary) // _NUM_PIECES + 1]]
    if not wrong and _ids(found, texts) != _ids(expected, texts):
        issue("tokenizer", f"splits text in another way than that of {original}")
    return None


def _load(directory: Path):
    """Return transformers' tokenizer of a directory, without running code from it. Raises QADError."""
    from transformers import AutoTokenizer

    check_json_files(directory)
    with failures_are_bad_documents("transformers cannot read the tokenizer"):
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _ids(tokenizer, texts: list[str]) -> list[list[int]] | None:
    """Return the ids of each text; None if the tokenizer rejects one."""
    try:
        with failures_are_bad_documents("the tokenizer rejected a text"):
            return [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    except QADError:
        return None
