"""PREFIX.json, the metadata that ``prepare_data`` writes next to PREFIX.bin/.idx, and the names of all output files.

The loss mask is a second indexed dataset, PREFIX_loss_mask.bin/.idx: uint8, one value per token, the same documents. It
exists only if some token does not count, so that prepared plain text has exactly the files that Megatron writes. Images
are two more (``images.image_files``), which exist if some document has one.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path

from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

FORMAT_VERSION = 1
IMAGE_SUFFIXES = ("images.bin", "images.idx", "image_refs.bin", "image_refs.idx")
"""Suffixes of the files of images in ``DataMetadata.sha256``."""
_ADVICE = (
    "megatron-qad prepare writes its metadata under this name. If the file is something else, rename it; if not, "
    "prepare the data again."
)


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
    """Number of records of all inputs that could not become a document."""
    blank_lines: int
    """Number of empty lines in JSONL files and of empty pieces of split text, of all inputs."""
    loss_mask: bool
    """Whether PREFIX_loss_mask.bin/.idx exists."""
    sha256: dict[str, str]
    """File suffix ("bin", "idx", "loss_mask.bin", "loss_mask.idx" of a mask, and four of images) -> SHA-256, compared
    when a job starts (``checks``)."""
    chats: int | None = None
    """Number of lines with chat messages. None: prepared before this was counted."""
    format_version: int = FORMAT_VERSION
    probe_sha256: str = ""
    """Hash of the ids of ``tokenizer.PROBE``: how the tokenizer cuts text. Empty in files of older versions."""
    images: dict | None = None
    """None: no document has images. "settings": those of ``ImageSettings``; "images": number of different images;
    "uses": number of images of all documents; "tiles": number of their tiles; "documents": documents with images."""

    def image_settings(self) -> ImageSettings | None:
        """Return how images became tokens, or None if no document has images."""
        return None if self.images is None else ImageSettings.from_dict(self.images["settings"])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def loss_mask_prefix(prefix: str) -> str:
    """Return the prefix of the loss mask's indexed dataset."""
    return f"{prefix}_loss_mask"


def images_prefix(prefix: str) -> str:
    """Return the prefix of the images' indexed dataset."""
    return f"{prefix}_images"


def image_refs_prefix(prefix: str) -> str:
    """Return the prefix of the indexed dataset that says which images each document has."""
    return f"{prefix}_image_refs"


def valid_prefix(prefix: str) -> str:
    """Return the prefix of the documents that ``--validation-fraction`` holds out."""
    return f"{prefix}_valid"


def metadata_path(prefix: str) -> Path:
    return Path(f"{prefix}.json")


def data_file(prefix: str, suffix: str) -> str:
    """Return the path of the file with a suffix of ``DataMetadata.sha256``."""
    return f"{prefix}_{suffix}" if "." in suffix else f"{prefix}.{suffix}"


def output_files(prefix: str) -> list[Path]:
    """Return every file that an output may have. The metadata is last: it is put in place after the others."""
    suffixes = ("loss_mask.bin", "loss_mask.idx", *IMAGE_SUFFIXES, "bin", "idx", "json")
    return [Path(data_file(prefix, suffix)) for suffix in suffixes]


def pairs_of_files(prefix: str) -> dict[str, str]:
    """Return the prefixes of the indexed datasets that an output may have in addition: what they hold -> prefix."""
    masks, images, refs = loss_mask_prefix(prefix), images_prefix(prefix), image_refs_prefix(prefix)
    return {"loss mask": masks, "images": images, "image references": refs}


def load_metadata(prefix: str) -> DataMetadata | None:
    """Read PREFIX.json. None means that it does not exist, because another tool prepared the data.

    Raises:
        QADError: the file cannot be read, was not written by this version, or lacks a field.
    """
    path = metadata_path(prefix)
    if not path.exists():
        return None
    content = read_json(path, _ADVICE)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        found = "is not metadata of megatron-qad prepare" if version is None else f"has format version {version}"
        raise QADError(f"{path} {found}, expected format version {FORMAT_VERSION}. Prepare the data again.")
    fields = {field.name: field for field in dataclasses.fields(DataMetadata)}
    names = [name for name, field in fields.items() if field.default is dataclasses.MISSING or name in content]
    wrong = [name for name in content if name not in fields] or [
        name for name in names if name not in content or not _is_a(content[name], fields[name].type)
    ]
    if wrong:
        found = f"the value {content[wrong[0]]!r}" if wrong[0] in content else "no value"
        raise QADError(f"{path} has {found} of {wrong[0]!r}, so it is damaged. Copy it or prepare the data again.")
    metadata = DataMetadata(**content)
    try:
        metadata.image_settings()
    except (QADError, KeyError, TypeError) as error:
        raise QADError(f"{path} has damaged 'images' ({error}). Copy it or prepare the data again.") from error
    return metadata


def _is_a(value: object, kind: type) -> bool:
    if kind == dict | None and isinstance(value, dict):
        return isinstance(value.get("settings"), dict)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())
    return type(value) in (kind.__args__ if isinstance(kind, types.UnionType) else (kind,))
