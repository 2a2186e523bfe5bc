"""The files of one prefix, checked by their names, sizes and index: they exist, belong together, and hold integers."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset

from megatron_qad.data.metadata import (
    IMAGE_SUFFIXES,
    DataMetadata,
    data_file,
    image_refs_prefix,
    images_prefix,
    load_metadata,
    loss_mask_prefix,
)
from megatron_qad.data.prefix_files import COPY_AGAIN
from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class PreparedFiles:
    """The files of one prefix, as ``open_prefix`` has found them."""

    prefix: str
    metadata: DataMetadata | None
    """None if another tool, such as Megatron's preprocess_data.py, prepared the data."""
    dtype: str
    """NumPy type of the ids."""
    num_tokens: int

    def files(self) -> dict[str, str | None]:
        """Return the files whose content is read when a job starts: path -> type of the ids in it, or None."""
        suffixes = ["bin"] if self.metadata is None else self.metadata.sha256
        return {data_file(self.prefix, suffix): self.dtype if suffix == "bin" else None for suffix in suffixes}


def open_prefix(prefix: str) -> PreparedFiles:
    """Check the indices, the metadata, the loss mask and the images of a prefix, without reading ids.

    Raises:
        QADError: a damaged index, files that do not belong together, a loss mask without metadata, ids that are not
            integers, or no token that counts in the loss.
    """
    metadata = load_metadata(prefix)
    index = _read_index(prefix).index
    dtype, lengths = np.dtype(index.dtype), index.sequence_lengths
    data = PreparedFiles(prefix, metadata, dtype.name, int(lengths.sum(dtype=np.int64)))
    if not np.issubdtype(dtype, np.integer):
        raise QADError(f"--data-path {prefix}: {prefix}.idx declares {dtype.name}. Expected integers: token ids.")
    has_mask = IndexedDataset.exists(loss_mask_prefix(prefix))
    if metadata is None:
        if has_mask:
            raise QADError(
                f"--data-path {prefix}: {prefix}.json is missing. megatron-qad prepare wrote it with the loss mask; "
                f"without it the files cannot be checked. {COPY_AGAIN}"
            )
        return data
    _check_metadata(data, len(lengths), has_mask)
    if has_mask:
        mask = _read_index(loss_mask_prefix(prefix), prefix).index
        if mask.dtype != np.uint8 or not np.array_equal(mask.sequence_lengths, lengths):
            raise QADError(
                f"--data-path {prefix}: {loss_mask_prefix(prefix)} does not match {prefix}: expected uint8 and "
                f"{len(lengths)} documents of the same lengths, found {np.dtype(mask.dtype).name} and "
                f"{len(mask.sequence_lengths)} documents. {COPY_AGAIN}"
            )
    _check_images(data, len(lengths))
    return data


def _check_images(data: PreparedFiles, num_documents: int) -> None:
    """Check the image files by their indices, without reading images."""
    prefix, recorded = data.prefix, data.metadata.images
    images, refs = images_prefix(prefix), image_refs_prefix(prefix)
    has_files = [other for other in (images, refs) if IndexedDataset.exists(other)]
    if recorded is None or len(has_files) < 2:
        if recorded is None and not has_files:
            return
        effect = "records no images" if recorded is None else f"records {recorded['images']} images"
        file = has_files[0] if recorded is None else images if images not in has_files else refs
        problem = "exist: they are of different data" if recorded is None else "are missing"
        raise QADError(f"--data-path {prefix}: {prefix}.json {effect}, but {file}.bin and .idx {problem}. {COPY_AGAIN}")
    stored, used = (_read_index(other, prefix).index for other in (images, refs))
    expected = (recorded["images"], 3 * recorded["uses"], num_documents, "uint8", "int32")
    found = len(stored.sequence_lengths), int(used.sequence_lengths.sum(dtype=np.int64)), len(used.sequence_lengths)
    found = (*found, np.dtype(stored.dtype).name, np.dtype(used.dtype).name)
    if found != expected:
        raise QADError(
            f"--data-path {prefix}: {images} and {refs} do not match {prefix}.json: expected (images, numbers of "
            f"references, documents, types) {expected}, found {found}. {COPY_AGAIN}"
        )


def _check_metadata(data: PreparedFiles, num_documents: int, has_mask: bool) -> None:
    prefix, metadata = data.prefix, data.metadata
    expected, found = (metadata.documents, metadata.tokens), (num_documents, data.num_tokens)
    if expected != found:
        raise QADError(
            f"--data-path {prefix}: {prefix}.json describes {expected[0]} documents with {expected[1]} tokens, but "
            f"{prefix}.idx has {found[0]} with {found[1]}: they are of different data. {COPY_AGAIN}"
        )
    if metadata.loss_mask != has_mask:
        mask = f"{loss_mask_prefix(prefix)}.bin and .idx"
        problem = f"{mask} are missing" if metadata.loss_mask else f"{mask} exist: they are of different data"
        effect = "records a loss mask" if metadata.loss_mask else "records that every token counts"
        raise QADError(f"--data-path {prefix}: {prefix}.json {effect}, but {problem}. {COPY_AGAIN}")
    masks = ["loss_mask.bin", "loss_mask.idx"] if has_mask else []
    images = IMAGE_SUFFIXES if metadata.images is not None else ()
    if missing := [suffix for suffix in ["bin", "idx", *masks[:1], *images] if suffix not in metadata.sha256]:
        raise QADError(f"{prefix}.json has no SHA-256 of {data_file(prefix, missing[0])}. {COPY_AGAIN}")
    if unknown := [suffix for suffix in metadata.sha256 if suffix not in ("bin", "idx", *masks, *images)]:
        raise QADError(f"{prefix}.json has a SHA-256 of {unknown[0]!r}, which no such data has. {COPY_AGAIN}")
    if metadata.supervised_tokens == 0:
        raise QADError(
            f"--data-path {prefix}: none of its {metadata.tokens} tokens counts in the loss ({prefix}.json, "
            "supervised_tokens). Omit it, or prepare data with tokens that count."
        )


def _read_index(prefix: str, owner: str | None = None) -> IndexedDataset:
    """Open a dataset whose index is consistent with itself and with the size of the data.

    Args:
        owner: prefix that the user gave, if ``prefix`` is that of its loss mask or images.
    """
    name = f"--data-path {owner or prefix}"
    if problem := _index_problem(Path(f"{prefix}.idx")):
        raise QADError(f"{name}: {prefix}.idx cannot be read ({problem}). Prepare the data again.")
    try:
        # Without mmap: an empty .bin cannot be mapped.
        data = IndexedDataset(prefix, mmap=False)
    except (AssertionError, ValueError, OSError, KeyError, OverflowError, struct.error) as error:
        raise QADError(f"{name}: {prefix}.idx cannot be read ({error}). Prepare the data again.") from error
    lengths, width = data.index.sequence_lengths, data.index.dtype_size
    expected, actual = int(lengths.sum(dtype=np.int64)) * width, Path(f"{prefix}.bin").stat().st_size
    if actual != expected or not len(data):
        raise QADError(
            f"{name}: {prefix}.bin has {actual} bytes, but its index of {len(data)} documents implies "
            f"{expected}; at least one document is required. {COPY_AGAIN}"
        )
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if lengths.min() < 0 or not np.array_equal(starts * width, data.index.sequence_pointers):
        raise QADError(
            f"{name}: {prefix}.idx is damaged: its documents do not follow each other in {prefix}.bin. {COPY_AGAIN}"
        )
    return data


def _index_problem(file: Path) -> str | None:
    """Return why Megatron's reader would fail on an index, or None.

    The reader's destructor fails, too, when it has failed, and prints a traceback that no ``except`` can catch.
    """
    header = struct.Struct(f"<{len(_INDEX_HEADER)}sQBQQ")  # magic, version, type of the ids, documents twice
    try:
        with file.open("rb") as stream:
            content = stream.read(header.size)
        if len(content) < header.size:
            return f"{len(content)} bytes, expected at least {header.size}"
        magic, version, dtype, num_sequences, num_documents = header.unpack(content)
        if magic != _INDEX_HEADER or version != 1:
            return "it does not begin as an index does"
        if dtype not in [member.value for member in DType]:
            return f"unknown type of ids {dtype}"
        expected = header.size + (4 + 8) * num_sequences + 8 * num_documents  # lengths, offsets, document starts
        size = file.stat().st_size
        return None if size == expected else f"{size} bytes, expected {expected} for {num_sequences} sequences"
    except OSError as error:
        return error.strerror
