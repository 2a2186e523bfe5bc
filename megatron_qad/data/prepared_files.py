"""The files of one prefix, checked by their names, sizes and index: they exist, belong together, and hold integers."""

import difflib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset

from megatron_qad.data.metadata import DataMetadata, data_file, load_metadata, loss_mask_prefix, metadata_path
from megatron_qad.engine.errors import QADError

_AGAIN = "Copy all files of the prefix again, or prepare the data again."


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


def file_sizes(prefix: str) -> dict[str, int]:
    """Return the size in bytes of each file of a prefix that exists.

    Raises:
        QADError: one of PREFIX.bin and PREFIX.idx does not exist, or only one of the two files of the loss mask does.
    """
    mask = loss_mask_prefix(prefix)
    names = [f"{prefix}.bin", f"{prefix}.idx", f"{mask}.bin", f"{mask}.idx", str(metadata_path(prefix))]
    sizes = {name: Path(name).stat().st_size for name in names if Path(name).is_file()}
    if missing := [name for name in names[:2] if name not in sizes]:
        raise QADError(
            f"--data-path {prefix}: {' and '.join(missing)} not found{_near_names(prefix)}. Expected the --output "
            "prefix of tools/prepare_data.py (without .bin), or 'WEIGHT PREFIX' pairs."
        )
    found = [name for name in names[2:4] if name in sizes]
    if len(found) == 1:
        lost = names[2] if found[0] == names[3] else names[3]
        raise QADError(f"--data-path {prefix}: {found[0]} exists, but {lost} does not. {_AGAIN}")
    return sizes


def open_prefix(prefix: str) -> PreparedFiles:
    """Check the index, the metadata and the loss mask of a prefix, without reading ids.

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
                f"--data-path {prefix}: {prefix}.json is missing. tools/prepare_data.py wrote it with the loss mask; "
                f"without it the files cannot be checked. {_AGAIN}"
            )
        return data
    _check_metadata(data, len(lengths), has_mask)
    if has_mask:
        mask = _read_index(loss_mask_prefix(prefix), prefix).index
        if mask.dtype != np.uint8 or not np.array_equal(mask.sequence_lengths, lengths):
            raise QADError(
                f"--data-path {prefix}: {loss_mask_prefix(prefix)} does not match {prefix}: expected uint8 and "
                f"{len(lengths)} documents of the same lengths, found {np.dtype(mask.dtype).name} and "
                f"{len(mask.sequence_lengths)} documents. {_AGAIN}"
            )
    return data


def _check_metadata(data: PreparedFiles, num_documents: int, has_mask: bool) -> None:
    prefix, metadata = data.prefix, data.metadata
    expected, found = (metadata.documents, metadata.tokens), (num_documents, data.num_tokens)
    if expected != found:
        raise QADError(
            f"--data-path {prefix}: {prefix}.json describes {expected[0]} documents with {expected[1]} tokens, but "
            f"{prefix}.idx has {found[0]} with {found[1]}: they are of different data. {_AGAIN}"
        )
    if metadata.loss_mask != has_mask:
        mask = f"{loss_mask_prefix(prefix)}.bin and .idx"
        problem = f"{mask} are missing" if metadata.loss_mask else f"{mask} exist: they are of different data"
        effect = "records a loss mask" if metadata.loss_mask else "records that every token counts"
        raise QADError(f"--data-path {prefix}: {prefix}.json {effect}, but {problem}. {_AGAIN}")
    masks = ["loss_mask.bin", "loss_mask.idx"] if has_mask else []
    if missing := [suffix for suffix in ["bin", "idx", *masks[:1]] if suffix not in metadata.sha256]:
        raise QADError(f"{prefix}.json has no SHA-256 of {data_file(prefix, missing[0])}. {_AGAIN}")
    if unknown := [suffix for suffix in metadata.sha256 if suffix not in ("bin", "idx", *masks)]:
        raise QADError(f"{prefix}.json has a SHA-256 of {unknown[0]!r}, which no such data has. {_AGAIN}")
    if metadata.supervised_tokens == 0:
        raise QADError(
            f"--data-path {prefix}: none of its {metadata.tokens} tokens counts in the loss ({prefix}.json, "
            "supervised_tokens). Omit it, or prepare data with tokens that count."
        )


def _read_index(prefix: str, owner: str | None = None) -> IndexedDataset:
    """Open a dataset whose index is consistent with itself and with the size of the data.

    Args:
        owner: prefix that the user gave, if ``prefix`` is that of its loss mask.
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
            f"{expected}; at least one document is required. {_AGAIN}"
        )
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if lengths.min() < 0 or not np.array_equal(starts * width, data.index.sequence_pointers):
        raise QADError(
            f"{name}: {prefix}.idx is damaged: its documents do not follow each other in {prefix}.bin. {_AGAIN}"
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


def _near_names(prefix: str) -> str:
    """Return ``" (did you mean data/chats?)"`` if data with a similar prefix exists, or an empty string."""
    path = Path(prefix)
    folders = [folder for folder in (path.parent, path) if folder.is_dir()]
    known = [str(file)[: -len(".idx")] for folder in folders for file in sorted(folder.glob("*.idx"))]
    known = [name for name in known if Path(f"{name}.bin").is_file() and not name.endswith("_loss_mask")]
    stem = prefix.removesuffix(path.suffix) if path.suffix in (".bin", ".idx", ".json") else prefix
    stem = str(Path(stem.removesuffix("_loss_mask")))
    # First other spellings of the same name, and data in a folder of that name, then similar names.
    close = [name for name in known if name == stem or name.startswith((f"{stem}.", f"{stem}_", f"{stem}/"))]
    close = close or difflib.get_close_matches(stem, known, n=1, cutoff=0.8)
    return f" (did you mean {close[0]}?)" if close else ""
