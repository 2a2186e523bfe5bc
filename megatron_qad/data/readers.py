"""Read input files as records with their file and line.

A JSON file has one record per line, or is one list of records. A table (parquet, a Hugging Face dataset) has one record
per row. A text file is one record unless a pattern splits it. Records are bytes: ``sources.encode_record`` decodes and
parses them in the worker, where a problem becomes a ``BadLine``. Not supported: CSV, dataset scripts.
"""

import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from megatron_qad.data import tables, tar_shards
from megatron_qad.data.input_files import COMPRESSED_SUFFIXES, compression, first_bytes, open_input
from megatron_qad.data.json_values import is_one_object_per_line, read_json_values
from megatron_qad.data.records import MAX_RECORD_BYTES, BadLine, Record
from megatron_qad.engine.errors import QADError

BLANK_LINES = r"\n(?:[ \t\r]*\n)+"
"""Pattern of ``--split-on blank``: documents are separated by one or more blank lines."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_REFUSED_SUFFIXES = (".csv", ".tsv", ".xls", ".xlsx")
_SPLIT_NAME = re.compile(r"(?<![a-z])(train(?:ing)?|test|valid(?:ation)?|val|dev|eval)(?![a-z])")
_TOO_LARGE = f"is larger than {MAX_RECORD_BYTES >> 20} MiB; split it"


def expand_inputs(inputs: list[str]) -> list[Path]:
    """Return the files of ``--input`` in order; a directory stands for the data files in it.

    A directory written by ``save_to_disk`` is one input.

    Raises:
        QADError: an input that does not exist, is neither a file nor a directory with data of one split, or is given
            twice.
    """
    if not inputs:
        raise QADError("--input: no file was given. Give text or JSON files, parquet files or datasets.")
    paths, seen = [path for name in inputs for path in _expand(Path(name))], {}
    for path in paths:
        status = path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            raise QADError(f"--input: {first} and {path} are the same file. Give each file once.")
    return paths


def file_format(path: Path, requested: str) -> str:
    """Return "table", "tar", "json" or "text" for an input; ``requested`` is --format, where "auto" uses the suffix.

    Raises:
        QADError: the suffix is that of a format that is not read.
    """
    try:
        if path.is_dir() or first_bytes(path).startswith(b"PAR1") or path.suffix.lower() in _TABLE_SUFFIXES:
            return "table"
        if tar_shards.is_tar(path):
            return "tar"
        suffix = _suffix(path)
        if path.suffix.lower() in COMPRESSED_SUFFIXES and not compression(path) and path.stat().st_size == 0:
            raise QADError(f"--input {path}: is empty, expected compressed data. Copy or download it again.")
    except OSError as error:
        raise QADError(f"--input {path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if requested != "auto":
        return "json" if requested == "jsonl" else requested
    if suffix in _REFUSED_SUFFIXES:
        raise QADError(
            f"--input {path}: {suffix} files are not read, because nothing says which column is the text. Convert it "
            'to JSONL with "text" or "messages", or give --format text if the lines themselves are the text.'
        )
    return "json" if suffix in JSON_SUFFIXES else "text"


def read_records(
    path: Path, fmt: str, split_on: str | None, with_images: bool = False
) -> Iterator[Record | BadLine | int]:
    """Yield the records of one input in order; an int is a number of blank lines or pieces that were skipped.

    Args:
        path: the file, or a directory of ``save_to_disk``.
        fmt: "text", "json" (or "jsonl"), "table" or "tar", see ``file_format``.
        split_on: regular expression (over UTF-8 bytes, ^ and $ match at lines) that separates the documents of a text
            file, or None for one document per file.
        with_images: whether to read a table's columns of images.

    Raises:
        QADError: the input cannot be read, is damaged, or is not what its format says.
    """
    if fmt == "table":
        for number, row in enumerate(tables.read_rows(path, with_images), start=1):
            yield Record(str(path), number, True, row.encode("utf-8"))
        return
    if fmt == "tar":
        yield from tar_shards.read_samples(path)
        return
    with open_input(path) as stream:
        if fmt == "text":
            yield from _read_text(stream, path, split_on)
        elif is_one_object_per_line(stream.peek()):
            yield from _read_lines(stream, path)
        else:
            for line, value in read_json_values(stream, str(path)):
                yield Record(str(path), line, True, value.encode("utf-8", "surrogatepass"))


def _read_lines(stream: BufferedReader, path: Path) -> Iterator[Record | BadLine | int]:
    line_number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        line_number += 1
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_RECORD_BYTES)
            yield BadLine(str(path), line_number, f"the line {_TOO_LARGE}")
            continue
        # A byte order mark at the start of the file is not part of the first line.
        line = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
        yield Record(str(path), line_number, True, line) if line.strip() else 1


def _read_text(stream: BufferedReader, path: Path, split_on: str | None) -> Iterator[Record | BadLine | int]:
    if split_on is None:
        content = stream.read(MAX_RECORD_BYTES + 1).removeprefix(b"\xef\xbb\xbf")
        yield _piece(path, 1, content)
        return
    content = stream.read().removeprefix(b"\xef\xbb\xbf")
    start, line_number = 0, 1
    for match in re.finditer(split_on.encode("utf-8"), content, flags=re.MULTILINE):
        if match.end() == match.start():
            raise QADError(f"--split-on {split_on!r} matches the empty string at byte {match.start()} of {path}.")
        yield _piece(path, line_number, content[start : match.start()])
        line_number += content.count(b"\n", start, match.end())
        start = match.end()
    if start < len(content):
        yield _piece(path, line_number, content[start:])


def _piece(path: Path, line: int, content: bytes) -> Record | BadLine | int:
    if len(content) > MAX_RECORD_BYTES:
        return BadLine(str(path), line, f"the text {_TOO_LARGE} into documents, for example with --split-on")
    return Record(str(path), line, False, content) if content.strip() else 1


def _suffix(path: Path) -> str:
    """Return a file's suffix in lower case, without that of a compression."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return name.suffix.lower()


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        kind = "is not a file" if path.exists() or path.is_symlink() else "does not exist"
        raise QADError(f"--input: {path} {kind}. Give existing text, JSON or parquet files, or dataset directories.")
    if (path / "state.json").is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = {child.name: [child] for child in sorted(path.iterdir()) if (child / "state.json").is_file()}
    else:
        splits = _data_files(path)
    if not splits:
        raise QADError(
            f"--input: {path} is a directory without parquet or JSON files, and not written by save_to_disk. Give "
            "the files in it."
        )
    if len(splits) > 1:
        raise QADError(
            f"--input: {path} has the splits {', '.join(splits)}. Give the files or the directory of those that you "
            f"want, such as {next(iter(splits.values()))[0]}."
        )
    return next(iter(splits.values()))


def _data_files(path: Path) -> dict[str, list[Path]]:
    """Return the data files below a directory by split, or by directory where the names tell no split."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        about = file.name in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
        if hidden or about or not file.is_file() or _suffix(file) not in (*JSON_SUFFIXES, *_TABLE_SUFFIXES):
            continue
        name = _SPLIT_NAME.search(relative.as_posix().lower())
        parent = [part for part in relative.parent.parts if not _SPLIT_NAME.fullmatch(part.lower())]
        key = "/".join([*parent, *([name.group(1)] if name else [])]) or "."
        splits.setdefault(key, []).append(file)
    return splits
