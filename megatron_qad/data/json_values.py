"""Reads JSON that is not one object per line: one list, or values over several lines, without holding all of it."""

import io
import json
from collections.abc import Iterator
from typing import BinaryIO

from megatron_qad.data.records import MAX_RECORD_BYTES
from megatron_qad.engine.errors import QADError

_READ_CHARS = 1 << 20
_BLANK = " \t\r\n"


def is_one_object_per_line(start: bytes) -> bool:
    """Whether the first bytes of a file are those of JSONL rather than of one list or of objects over several lines."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    first, newline, rest = start.partition(b"\n")
    if start[:1] not in (b"[", b"{") or (start[:1] == b"{" and not newline):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # A damaged line of JSONL is one bad line. A line that ends after a bracket or a comma continues in the next.
        return start[:1] == b"{" and not first.rstrip().endswith((b"{", b"[", b","))
    return start[:1] == b"{" or bool(rest.strip())


def read_json_values(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line, JSON text) of each element of a list, or of each value if the file does not start with a list.

    Args:
        stream: UTF-8 text.
        name: the file, for errors.

    Raises:
        QADError: damaged JSON. What follows it cannot be found, so no element after it can be read.
    """
    values = _Values(stream, name)
    try:
        is_list = values.next_char() == "["
        values.position += is_list
        while char := values.next_char():
            if is_list and char == "]":
                values.position += 1
                if values.next_char():
                    raise values.error("text follows the end of the list")
                return
            yield values.read_value()
            if is_list and values.next_char() == ",":
                values.position += 1
            elif is_list and values.next_char() != "]":
                raise values.error("expected ',' or ']' after an element")
        if is_list:
            raise values.error("the file ends inside the list")
    except UnicodeDecodeError as error:
        raise values.error(f"not UTF-8 ({error.reason})") from error


class _Values:
    """A position in a stream of JSON text, of which only the part around the position is held."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream, self.name = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), name
        self.buffer, self.position, self.line = "", 0, 1

    def next_char(self) -> str:
        """Skip white space and return the next character, "" at the end of the file."""
        while True:
            start = self.position
            while self.position < len(self.buffer) and self.buffer[self.position] in _BLANK:
                self.position += 1
            self.line += self.buffer.count("\n", start, self.position)
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._read():
                return ""

    def read_value(self) -> tuple[int, str]:
        """Return (line, text) of the value at the position and move behind it."""
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self.buffer, self.position)
                break
            except RecursionError as error:
                raise self.error("its values are nested too deeply") from error
            except ValueError as error:  # damaged, or not yet read to its end
                if len(self.buffer) > MAX_RECORD_BYTES or not self._read():
                    problem = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise self.error(f"not JSON: {problem}") from error
        line, text = self.line, self.buffer[self.position : end]
        self.line += text.count("\n")
        self.position = end
        return line, text

    def _read(self) -> bool:
        """Read more text, as much as is held so that a long value is parsed a few times only; False at the end."""
        rest = self.buffer[self.position :]
        more = self.stream.read(max(_READ_CHARS, len(rest)))
        self.buffer, self.position = rest + more, 0
        return bool(more)

    def error(self, problem: str) -> QADError:
        return QADError(f"--input {self.name}:{self.line}: {problem}. Repair it or use one object per line (.jsonl).")
