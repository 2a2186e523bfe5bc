"""Opens input files: decompresses them by their content, and names the kind of a file that is not UTF-8 text."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_qad.engine.errors import QADError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
PEEK_BYTES = 1 << 16

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
# UTF-32 first: its mark starts with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BINARY = {
    b"PK\x03\x04": "a zip archive (.zip, .xlsx, .docx, .pt)",
    b"\xd0\xcf\x11\xe0": "an old Office file (.xls, .doc)",
    b"%PDF-": "a PDF",
    b"7z\xbc\xaf'\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"MMIDIDX": "the index of prepared data (.idx)",
    **{bytes([0x80, protocol]): "a Python pickle" for protocol in range(2, 6)},
}


@contextlib.contextmanager
def open_input(path: Path) -> Iterator[io.BufferedReader]:
    """Open an input file of text or JSON for reading. gzip, zstd, bzip2 and xz are decompressed, under any name.

    Raises:
        QADError: the file cannot be read, its compressed data is damaged, or its first bytes are not UTF-8 text.
    """
    kind = "file"
    try:
        with contextlib.ExitStack() as stack:
            kind = compression(path) or kind
            stream = stack.enter_context(io.BufferedReader(_raw(path, kind, stack), PEEK_BYTES))
            _check_is_text(path, stream.peek())
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if kind == "file":
            raise QADError(f"--input {path}: cannot be read ({error}). Check the path and its permissions.") from error
        raise QADError(f"--input {path}: its {kind} data is damaged ({error}). Copy or download it again.") from error


def compression(path: Path) -> str | None:
    """Return the name of a file's compression by its first bytes, or None."""
    start = first_bytes(path)
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file, which tell its kind."""
    with path.open("rb") as stream:
        return stream.read(8)


def _raw(path: Path, kind: str, stack: contextlib.ExitStack):
    if kind == "gzip":
        return gzip.GzipFile(path)
    if kind == "bzip2":
        return bz2.BZ2File(path)
    if kind == "xz":
        return lzma.LZMAFile(path)
    if kind == "zstd":
        import pyarrow

        source = stack.enter_context(pyarrow.OSFile(str(path)))
        return pyarrow.CompressedInputStream(source, "zstd")
    return path.open("rb", buffering=0)


def _check_is_text(path: Path, start: bytes) -> None:
    """Check that the first bytes of the (decompressed) content are not those of another encoding or a binary file."""
    encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    if encoding is not None:
        raise QADError(
            f"--input {path}: is {encoding}, expected UTF-8. Convert it: iconv -f {encoding} -t UTF-8 {path} > NEW_FILE"
        )
    kind = next((name for magic, name in _BINARY.items() if start.startswith(magic)), None)
    kind = "a tar archive" if start[257:262] == b"ustar" else kind
    if kind is None and b"\0" in start[:4096]:
        kind = "binary, or UTF-16 without a byte order mark (it has NUL bytes)"
    if kind is not None:
        raise QADError(
            f"--input {path}: is {kind}, expected UTF-8 text, JSON, parquet or a Hugging Face dataset. Convert it."
        )
