"""Reads tar shards of samples: files whose names differ in their suffix only, such as ``7.json`` and ``7.jpg``.

This is the layout of WebDataset. A sample is a record with the content of its ``.json`` file; its image files are those
that the record names, or all of them in the order of their names. Members of a sample follow each other. Members of
other kinds are left out. Shards are read with Python's tarfile from start to end, also compressed with gzip, bzip2 or
xz; nothing is extracted to the disk.
"""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_qad.data.records import MAX_RECORD_BYTES, BadLine, Record
from megatron_qad.engine.errors import QADError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def is_tar(path: Path) -> bool:
    """Whether an input is a tar shard, by its name."""
    return path.name.lower().endswith(SUFFIXES)


def read_samples(path: Path) -> Iterator[Record | BadLine]:
    """Yield the samples of a shard as records, numbered from 1.

    Raises:
        QADError: the shard is damaged or cannot be read.
    """
    try:
        with tarfile.open(path, "r|*") as shard:
            key, number, members = None, 0, {}
            for member in shard:
                if not member.isfile():
                    continue
                if _key(member.name) != key:
                    if members:
                        yield _record(path, number, key, members)
                    key, members, number = _key(member.name), {}, number + 1
                if _suffix(member.name) in ("json", *_IMAGE_SUFFIXES):
                    is_held = member.size + sum(map(len, filter(None, members.values()))) <= MAX_RECORD_BYTES
                    members[member.name] = shard.extractfile(member).read() if is_held else None
            if members:
                yield _record(path, number, key, members)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise QADError(f"--input {path}: the tar shard is damaged ({error}). Copy or download it again.") from error


def _record(path: Path, number: int, key: str, members: dict[str, bytes | None]) -> Record | BadLine:
    texts = [name for name in members if _suffix(name) == "json"]
    if len(texts) != 1:
        return BadLine(str(path), number, f"the sample {key!r} has {len(texts)} .json files, expected one")
    if None in members.values():
        return BadLine(str(path), number, f"the sample {key!r} is larger than {MAX_RECORD_BYTES >> 20} MiB")
    images = tuple((name, data) for name, data in members.items() if name != texts[0])
    return Record(str(path), number, True, members[texts[0]], images)


def _key(name: str) -> str:
    """Return a member's path up to the first dot of its file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()
