"""The reason why an input record cannot become a document."""

import contextlib
from collections.abc import Iterator

from megatron_qad.engine.errors import QADError

_MAX_REASON = 300
"""Largest number of characters of another library's message that a reason quotes."""


class BadDocument(QADError):
    """Raised if an input record cannot become a document; the list of bad lines shows the message as the reason."""

    line_offset = 0
    """Number of lines between the start of the record and the problem."""


@contextlib.contextmanager
def failures_are_bad_documents(what: str) -> Iterator[None]:
    """Turn any failure of a template or a tokenizer inside the block into a ``BadDocument`` that starts with ``what``.

    Templates and tokenizers are programs of others that run on the data of others, so every class of exception occurs.
    A panic in a tokenizer's Rust code arrives as ``pyo3_runtime.PanicException``, which is no ``Exception`` and cannot
    be imported. An interrupt (Ctrl-C, exit) passes through.
    """
    try:
        yield
    except QADError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split()).rstrip(".")
        text = text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
        raise BadDocument(f"{what}: {type(error).__name__}" + (f": {text}" if text else "")) from error
