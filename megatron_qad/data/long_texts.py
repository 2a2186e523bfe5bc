"""Tokenizes a long text in overlapping pieces, with the ids that the whole text has.

tokenizers needs about 150 bytes of memory for each byte of a text that it encodes in one call. A piece starts at a
token of the piece before. Both encode the overlap, and they are joined in its middle if they have the same tokens
there, thousands of characters away from both artificial ends. Where they differ, the piece is made longer. Exception:
sentencepiece's unigram models choose between segmentations of equal score by the rounding of a sum over the whole text,
so that one token in 100,000 may differ from an encoding in one call.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_qad.data.bad_document import BadDocument

PIECE_CHARS = 1 << 18
"""Length of a piece in characters. Texts up to twice that length are encoded in one call."""
MAX_PIECE_CHARS = 1 << 22
_OVERLAP = 1 / 16
_MIN_EQUAL_TOKENS = 16

Encode = Callable[[str], tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Returns ids, and the first and the end character of each token, without special tokens."""


@dataclass
class _Piece:
    begin: int
    end: int
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def encode_in_pieces(
    text: str, encode: Encode, piece_chars: int = PIECE_CHARS, largest: int = MAX_PIECE_CHARS
) -> array:
    """Return the ids of ``text``, an ``array("i")``, as ``encode(text)`` has them.

    Args:
        text: any text; time is linear in its length, and memory that of a piece plus four bytes per token.
        encode: see ``Encode``.
        piece_chars: length of a piece.
        largest: length up to which a piece is made longer.

    Raises:
        BadDocument: two pieces of the largest length do not agree, because a token depends on text that far away.
    """
    result = array("i")
    piece, first = _encode_at(text, 0, piece_chars, encode), 0
    while piece.end < len(text):
        joined = _next_piece(text, piece, piece_chars, encode)
        if joined is None:
            size = 2 * (piece.end - piece.begin)
            if size > largest:
                raise BadDocument(
                    f"cannot be tokenized in pieces: the tokens around character {piece.end} depend on more than "
                    f"{size // 2} characters around them. Split the text into documents"
                )
            piece = _encode_at(text, piece.begin, size, encode)
            continue
        following, stop, start = joined
        result.frombytes(piece.ids[first:stop].tobytes())
        piece, first = following, start
    result.frombytes(piece.ids[first:].tobytes())
    return result


def _encode_at(text: str, begin: int, size: int, encode: Encode) -> _Piece:
    end = min(begin + size, len(text))
    ids, starts, ends = (np.asarray(values, dtype=np.int32) for values in encode(text[begin:end]))
    # A tokenizer may give tokens of one character offsets that step back.
    return _Piece(begin, end, ids, np.maximum.accumulate(starts + begin), ends + begin)


def _next_piece(text: str, piece: _Piece, size: int, encode: Encode) -> tuple[_Piece, int, int] | None:
    """Return (next piece, end of the tokens of ``piece``, first token of the next piece), or None if they disagree."""
    overlap = int((piece.end - piece.begin) * _OVERLAP)
    for begin in _places(text, piece, piece.end - overlap):
        following = _encode_at(text, begin, max(size, 2 * overlap), encode)
        low, high = begin + overlap // 4, piece.end - overlap // 4
        a, b = (slice(*np.searchsorted(p.starts, (low, high))) for p in (piece, following))
        equal = (np.array_equal(getattr(piece, x)[a], getattr(following, x)[b]) for x in ("ids", "starts", "ends"))
        if a.stop - a.start >= _MIN_EQUAL_TOKENS and all(equal):
            middle = (a.stop - a.start) // 2
            return following, a.start + middle, b.start + middle
    return None


def _places(text: str, piece: _Piece, low: int) -> list[int]:
    """Return where the next piece may start: a token at white space, where words begin, then any of a few tokens."""
    starts = np.unique(piece.starts[np.searchsorted(piece.starts, low) :])[:64].tolist()
    words = [s for s in starts if text[s].isspace() or text[s - 1].isspace()]
    return list(dict.fromkeys(words[:1] + starts[:4]))
