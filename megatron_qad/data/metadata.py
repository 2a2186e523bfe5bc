"""PREFIX.json: what ``prepare_data`` wrote beside PREFIX.bin and PREFIX.idx, and the names of all those files.

The loss mask is a second indexed dataset, PREFIX_loss_mask.bin/.idx: uint8, one value a token, the same documents. It
exists only where some token does not count, so that plain text is nothing but what Megatron itself would write.
"""

import dataclasses
import json
from pathlib import Path

from megatron_qad.engine.errors import QADError

FORMAT_VERSION = 1


@dataclasses.dataclass
class DataMetadata:
    """The contents of PREFIX.json."""

    tokenizer_name: str
    """Last part of the path that was given."""
    tokenizer_kind: str
    """"huggingface" or "sentencepiece"."""
    tokenizer_files_sha256: dict[str, str]
    """File name -> SHA-256 of its bytes."""
    vocab_sha256: str
    """Hash of the map piece -> id; what ``provider`` compares."""
    vocab_size: int
    """Largest id of the tokenizer + 1."""
    eod: int
    """Id that ends each document."""
    documents: int
    chat_documents: int
    """How many of them were chat messages."""
    tokens: int
    """All tokens, EOD included."""
    supervised_tokens: int
    """Tokens that count in the loss when they are the label."""
    unknown_tokens: int
    """Tokens that are the tokenizer's <unk>."""
    bad_lines: int
    blank_lines: int
    """Empty lines of JSONL files and empty pieces of split text."""
    loss_mask: bool
    """Whether PREFIX_loss_mask.bin/.idx exists."""
    sha256: dict[str, str]
    """File suffix ("bin", "loss_mask.bin") -> SHA-256; names the content for Megatron's index cache."""
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def loss_mask_prefix(prefix: str) -> str:
    """The prefix of the loss mask's indexed dataset."""
    return f"{prefix}_loss_mask"


def metadata_path(prefix: str) -> Path:
    return Path(f"{prefix}.json")


def output_files(prefix: str) -> list[Path]:
    """Every file that a finished preparation may have, the metadata last: it is written when the rest is in place."""
    mask = loss_mask_prefix(prefix)
    return [Path(f) for f in (f"{mask}.bin", f"{mask}.idx", f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json")]


def load_metadata(prefix: str) -> DataMetadata | None:
    """PREFIX.json, or None where the data was made by something else and has none.

    Raises:
        QADError: the file is not what this version writes.
    """
    path = metadata_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise QADError(f"{path} is not the metadata that tools/prepare_data.py writes ({error!r}).") from error
    if found != FORMAT_VERSION:
        raise QADError(f"{path} has format version {found}, expected {FORMAT_VERSION}. Prepare the data again.")
    try:
        return DataMetadata(**content)
    except TypeError as error:
        raise QADError(f"{path} has other fields than format version {FORMAT_VERSION}: {error}.") from error
