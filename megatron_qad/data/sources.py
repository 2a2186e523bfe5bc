"""Read input files as records with their file and line, and encode records as documents.

A JSONL file has one record per line. A text file is one record unless a pattern splits it. Records are bytes:
``encode_record`` decodes and parses them in the worker, where a problem becomes a ``BadLine``. Not supported:
compressed files, JSON arrays, directories.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.data.chat import BadDocument
from megatron_qad.data.tokenizer import DataTokenizer
from megatron_qad.engine.errors import QADError

BLANK_LINES = r"\n(?:[ \t\r]*\n)+"
"""Pattern of ``--split-on blank``: documents are separated by one or more blank lines."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_KEYS = ("auto", "text", "messages")


@dataclass(frozen=True)
class Record:
    """One input record: a candidate document."""

    file: str
    line: int
    """Line of the file where the record starts, from 1."""
    is_json: bool
    data: bytes


@dataclass(frozen=True)
class Encoded:
    """One tokenized document, EOD included."""

    ids: list[int]
    mask: list[int] | None
    """Loss mask. None means that every token counts."""


@dataclass(frozen=True)
class BadLine:
    """One record that could not become a document, and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def file_format(path: Path, requested: str) -> str:
    """Return "text" or "jsonl" for an input file; ``requested`` is --format, where "auto" uses the suffix."""
    if requested != "auto":
        return requested
    if path.suffix.lower() in JSONL_SUFFIXES:
        return "jsonl"
    if path.suffix.lower() == ".json":
        raise QADError(
            f"--input {path}: a .json file may be one value or one value per line. Give --format jsonl or text."
        )
    return "text"


def read_records(path: Path, fmt: str, split_on: str | None) -> Iterator[Record | int]:
    """Yield the records of one file in order; an int is a number of blank lines or pieces that were skipped.

    Args:
        path: the file.
        fmt: "text" or "jsonl".
        split_on: regular expression (over UTF-8 bytes, ^ and $ match at lines) that separates the documents of a text
            file, or None for one document per file.
    """
    if fmt == "jsonl":
        with path.open("rb") as stream:
            for line_number, line in enumerate(stream, start=1):
                # A byte order mark at the start of the file is not part of the first line.
                line = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
                yield Record(str(path), line_number, True, line) if line.strip() else 1
        return
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if split_on is None:
        yield Record(str(path), 1, False, content) if content.strip() else 1
        return
    start, line_number = 0, 1
    for match in re.finditer(split_on.encode("utf-8"), content, flags=re.MULTILINE):
        if match.end() == match.start():
            raise QADError(f"--split-on {split_on!r} matches the empty string at byte {match.start()} of {path}.")
        piece = content[start : match.start()]
        yield Record(str(path), line_number, False, piece) if piece.strip() else 1
        line_number += content.count(b"\n", start, match.end())
        start = match.end()
    if start < len(content):
        piece = content[start:]
        yield Record(str(path), line_number, False, piece) if piece.strip() else 1


def encode_record(
    record: Record, tokenizer: DataTokenizer, json_key: str = "auto", prepend_bos: bool = False
) -> Encoded | BadLine:
    """Tokenize one record and append EOD, or return a ``BadLine`` with the reason why that is not possible.

    EOD is appended unless the document already ends with it. In a chat it counts only if the token before it does, that
    is, if the template does not end the assistant's last message. In a JSONL line with ``"finish": "length"``, which
    ``data.generate`` writes for truncated text, the final special tokens do not count, because the model did not choose
    to end there.

    Raises:
        QADError: the tokenizer does not support the input (chat without a chat template).
    """
    try:
        ids, mask, is_truncated = _encode(record, tokenizer, json_key)
    except BadDocument as error:
        line = record.line + error.line_offset
        return BadLine(record.file, line, str(error))
    if prepend_bos and ids[0] != tokenizer.bos:
        ids.insert(0, tokenizer.bos)
        if mask is not None:
            mask.insert(0, 0)
    if ids[-1] != tokenizer.eod:
        ids.append(tokenizer.eod)
        if mask is not None:
            mask.append(mask[-1])
    if is_truncated:
        mask = _mask_end(ids, mask or [1] * len(ids), tokenizer.special)
    return Encoded(ids, mask)


def _mask_end(ids: list[int], mask: list[int], special: frozenset[int]) -> list[int]:
    """Clear ``mask`` at the special tokens that end the last run of counted tokens."""
    last = max(i for i, counts in enumerate(mask) if counts)
    while last > 0 and mask[last] and ids[last] in special:
        mask[last] = 0
        last -= 1
    return mask


def _encode(record: Record, tokenizer: DataTokenizer, json_key: str) -> tuple[list[int], list[int] | None, bool]:
    """Return (ids, mask, whether the text is truncated), without EOD."""
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = BadDocument(f"not UTF-8: byte {record.data[error.start]:#04x} ({error.reason})")
        bad.line_offset = record.data.count(b"\n", 0, error.start)
        raise bad from error
    mask, is_truncated = None, False
    if record.is_json:
        key, value, tools, is_truncated = _json_document(text, json_key)
        if key == "messages":
            ids, mask = tokenizer.encode_chat(value, tools)
        else:
            ids = _encode_text(value, tokenizer)
    else:
        ids = _encode_text(text, tokenizer)
    if not ids:
        raise BadDocument("the text has no tokens")
    return ids, mask, is_truncated


def _encode_text(text: str, tokenizer: DataTokenizer) -> list[int]:
    if not text.strip():
        raise BadDocument("the text is empty")
    return tokenizer.encode(text)


def _json_document(text: str, json_key: str) -> tuple[str, str | list, list | None, bool]:
    """Return (key, value, tools, whether the text is truncated) of a JSONL line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from error
    if not isinstance(line, dict):
        raise BadDocument(f"expected a JSON object with 'text' or 'messages', found {type(line).__name__}")
    keys = [k for k in ("text", "messages") if k in line] if json_key == "auto" else [json_key]
    if len(keys) == 2:
        raise BadDocument("has both 'text' and 'messages'; choose one with --json-key")
    if not keys or keys[0] not in line:
        expected = "'text' or 'messages'" if json_key == "auto" else repr(json_key)
        raise BadDocument(f"has no {expected}; its keys are {sorted(line)[:10]}")
    if not _is_unicode(text):
        raise BadDocument("has a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode")
    key, value, is_truncated = keys[0], line[keys[0]], line.get("finish") == "length"
    if key == "text":
        if not isinstance(value, str):
            raise BadDocument(f"'text' is {type(value).__name__}, expected a string")
        return key, value, None, is_truncated
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise BadDocument("'messages' is not a non-empty list of objects with a 'role'")
    tools = line.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadDocument(f"'tools' is {type(tools).__name__}, expected a list of JSON schemas")
    return key, value, tools or None, is_truncated


def _is_unicode(json_text: str) -> bool:
    """Whether no string of the JSON text decodes to a lone surrogate (only an escape can produce one)."""
    if "\\u" not in json_text:
        return True
    try:
        json.dumps(json.loads(json_text), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
