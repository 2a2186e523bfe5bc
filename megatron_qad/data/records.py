"""Records of the input files, and the reason why one could not become a document."""

from dataclasses import dataclass

MAX_RECORD_BYTES = 1 << 28
"""Largest record in bytes. A larger one is skipped without holding it in memory."""
MAX_CHAT_BYTES = 1 << 23
"""Largest JSON record with a chat. A chat is rendered and tokenized in one piece, about 150 bytes of memory a byte."""


@dataclass(frozen=True)
class Record:
    """One input record: a candidate document."""

    file: str
    line: int
    """Line of the file where the record starts, or row of a table, from 1."""
    is_json: bool
    data: bytes
    members: tuple[tuple[str, bytes], ...] = ()
    """(name, bytes) of the images of a tar shard's sample."""


@dataclass(frozen=True)
class BadLine:
    """One record that could not become a document, and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"
