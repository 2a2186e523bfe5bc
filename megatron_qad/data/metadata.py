"""PREFIX.json, the metadata that ``prepare_data`` writes next to PREFIX.bin/.idx, and the names of all output files.

The loss mask is a second indexed dataset, PREFIX_loss_mask.bin/.idx: uint8, one value per token, the same documents. It
exists only if some token does not count, so that prepared plain text has exactly the files that Megatron writes.
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
    """Last part of the path given by the user."""
    tokenizer_kind: str
    """Kind of tokenizer: "huggingface" or "sentencepiece"."""
    tokenizer_files_sha256: dict[str, str]
    """File name -> SHA-256 of its bytes."""
    vocab_sha256: str
    """Hash of the map piece -> id, which ``run_tokenizer`` compares."""
    vocab_size: int
    """Largest id of the tokenizer + 1."""
    eod: int
    """Token id that ends each document."""
    documents: int
    chat_documents: int
    """Number of documents that were chat messages; one chat may be several documents."""
    tokens: int
    """Number of tokens, EOD included."""
    supervised_tokens: int
    """Number of tokens that count in the loss when they are the label."""
    unknown_tokens: int
    """Number of tokens that are the tokenizer's <unk>."""
    bad_lines: int
    blank_lines: int
    """Number of empty lines in JSONL files and of empty pieces of split text."""
    loss_mask: bool
    """Whether PREFIX_loss_mask.bin/.idx exists."""
    sha256: dict[str, str]
    """File suffix ("bin", "loss_mask.bin") -> SHA-256; part of the cache key of Megatron's indices."""
    chats: int | None = None
    """Number of lines with chat messages. None: prepared before this was counted."""
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def loss_mask_prefix(prefix: str) -> str:
    """Return the prefix of the loss mask's indexed dataset."""
    return f"{prefix}_loss_mask"


def metadata_path(prefix: str) -> Path:
    return Path(f"{prefix}.json")


def output_files(prefix: str) -> list[Path]:
    """Return every file that an output may have. The metadata is last: it is put in place after the others."""
    mask = loss_mask_prefix(prefix)
    return [Path(f) for f in (f"{mask}.bin", f"{mask}.idx", f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json")]


def load_metadata(prefix: str) -> DataMetadata | None:
    """Read PREFIX.json. None means that it does not exist, because another tool prepared the data.

    Raises:
        QADError: the file was not written by this version.
    """
    path = metadata_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise QADError(
            f"{path} is not metadata of tools/prepare_data.py ({error!r}). Prepare the data again."
        ) from error
    if version != FORMAT_VERSION:
        raise QADError(f"{path} has format version {version}, expected {FORMAT_VERSION}. Prepare the data again.")
    try:
        return DataMetadata(**content)
    except TypeError as error:
        raise QADError(
            f"{path} does not have the fields of format version {FORMAT_VERSION}: {error}. Prepare the data again."
        ) from error
