"""Encode the records of the input files as documents; a problem becomes a ``BadLine``."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.chat_messages import Chat, parse_chat
from megatron_qad.data.images.image_parts import take_images
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.image_sources import ImageFile, ImageReader
from megatron_qad.data.images.placeholders import locate_images, mask_images
from megatron_qad.data.prepare_options import JSON_KEYS
from megatron_qad.data.records import MAX_CHAT_BYTES, BadLine, Record
from megatron_qad.data.sharegpt import with_messages
from megatron_qad.data.tokenizer import DataTokenizer


@dataclass(frozen=True)
class _Ids:
    """A document that was tokenized before."""

    ids: array
    mask: bytearray | None


@dataclass(frozen=True)
class Encoded:
    """One tokenized document, EOD included."""

    ids: array
    mask: bytearray | None
    """Loss mask: 1 where a token counts, else 0. None means that every token counts."""
    is_chat: bool = False
    """Whether it was chat messages."""
    images: tuple[tuple[int, ImageFile], ...] = ()
    """(offset of the first placeholder token, image) of each image, in order."""


def encode_record(
    record: Record,
    tokenizer: DataTokenizer,
    json_key: str = "auto",
    prepend_bos: bool = False,
    multi_turn: str = "each",
    images: ImageSettings | None = None,
    image_root: str | None = None,
) -> list[Encoded] | BadLine:
    """Tokenize one record and append EOD, or return a ``BadLine`` with the reason why that is not possible.

    A text is one document. A chat may be several, see ``data.chat.encode_chat``. "input_ids" are taken as they are.

    EOD is appended unless the document already ends with it. In a chat it counts only if the token before it does, that
    is, if the template does not end the assistant's last message. In a JSONL line with ``"finish": "length"``, which
    ``data.generate`` writes for truncated text, the final special tokens do not count, because the model did not choose
    to end there.

    With ``images``, the settings of a model, chats may have images, whose tokens never count. A literal image token
    becomes ordinary tokens. Local files are in ``image_root``, or else in the folder of the record's file.

    Raises:
        QADError: the tokenizer does not support the input (chat without a chat template).
    """
    reader = None if images is None else ImageReader(images, _image_root(record, image_root), dict(record.members))
    try:
        value, is_truncated = _parse(record, json_key, reader)
        is_chat = isinstance(value, Chat)
        if is_chat and (size := _num_text_bytes(record, value)) > MAX_CHAT_BYTES:
            limit = f"more than the {MAX_CHAT_BYTES:,} that a chat may have"
            raise BadDocument(f"the chat has {size:,} bytes, {limit}. Split it")
        if isinstance(value, _Ids):
            documents = [_checked_ids(value, tokenizer)]
        elif is_chat:
            documents = tokenizer.encode_chat(value, multi_turn)
        else:
            documents = [(_encode_text(value, tokenizer, images), None)]
        encoded = []
        for i, (ids, mask) in enumerate(documents, start=1):
            ids, mask = _with_ends(ids, mask, tokenizer, prepend_bos)
            if is_truncated and i == len(documents):
                mask = _mask_end(ids, mask or bytearray([1]) * len(ids), tokenizer.special)
            files = value.images.files if is_chat and value.images is not None else ()
            encoded.append(_with_images(Encoded(ids, mask, is_chat), files, images))
        return encoded
    except BadDocument as error:
        line = record.line + error.line_offset
        return BadLine(record.file, line, str(error))


def _with_ends(
    ids: array, mask: bytearray | None, tokenizer: DataTokenizer, prepend_bos: bool
) -> tuple[array, bytearray | None]:
    """Return ids and mask with EOD and, if asked for, BOS."""
    if prepend_bos and ids[0] != tokenizer.bos:
        ids.insert(0, tokenizer.bos)
        if mask is not None:
            mask.insert(0, 0)
    if ids[-1] != tokenizer.eod:
        ids.append(tokenizer.eod)
        if mask is not None:
            mask.append(mask[-1])
    return ids, mask


def _with_images(document: Encoded, files: Sequence[ImageFile], settings: ImageSettings | None) -> Encoded:
    """Return a document with the places of its images, which are the first of ``files``; their tokens do not count."""
    if settings is None:
        return document
    num_tiles = [file.num_tiles for file in files]
    offsets = locate_images(document.ids, num_tiles, settings)
    if not offsets:
        return document
    mask_images(document.mask, offsets, num_tiles, settings)
    return replace(document, images=tuple(zip(offsets, files, strict=False)))


def _image_root(record: Record, image_root: str | None) -> Path:
    path = Path(record.file)
    return Path(image_root) if image_root is not None else path if path.is_dir() else path.parent


def _num_text_bytes(record: Record, chat: Chat) -> int:
    """Return the size of a chat without its images."""
    has_images = chat.images is not None and chat.images.files
    return len(json.dumps(chat.messages, ensure_ascii=False).encode()) if has_images else len(record.data)


def _mask_end(ids: array, mask: bytearray, special: frozenset[int]) -> bytearray:
    """Clear ``mask`` at the special tokens that end the last run of counted tokens."""
    last = max(i for i, counts in enumerate(mask) if counts)
    while last > 0 and mask[last] and ids[last] in special:
        mask[last] = 0
        last -= 1
    return mask


def _parse(record: Record, json_key: str, reader: ImageReader | None) -> tuple[str | Chat | _Ids, bool]:
    """Return (the text, the chat or the ids, whether it is truncated)."""
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        advice = "If it is Latin-1, convert the file: iconv -f LATIN1 -t UTF-8"
        bad = BadDocument(f"not UTF-8: byte {record.data[error.start]:#04x} ({error.reason}). {advice}")
        bad.line_offset = record.data.count(b"\n", 0, error.start)
        raise bad from error
    return _json_document(text, json_key, reader) if record.is_json else (text, False)


def _encode_text(text: str, tokenizer: DataTokenizer, images: ImageSettings | None) -> array:
    if not text.strip():
        raise BadDocument("the text is empty")
    ids = tokenizer.encode(text) if images is None else tokenizer.encode_literally(text, images.image_token)
    if not ids:
        raise BadDocument("the text has no tokens")
    return ids if isinstance(ids, array) else array("i", ids)


def _checked_ids(document: _Ids, tokenizer: DataTokenizer) -> tuple[array, bytearray | None]:
    """Return ids and mask, after a check that the tokenizer has the ids."""
    if (largest := max(document.ids)) >= tokenizer.vocab_size:
        raise BadDocument(f"'input_ids' has the id {largest}, but the tokenizer has {tokenizer.vocab_size} ids")
    return document.ids, document.mask


def _parse_ids(line: dict[str, Any]) -> _Ids:
    """Return the document of a record with "input_ids" and, optionally, a "loss_mask" of as many zeros and ones."""
    ids, mask = line["input_ids"], line.get("loss_mask")
    if not isinstance(ids, list) or not ids or not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in ids):
        raise BadDocument("'input_ids' is not a non-empty list of integers of at least 0")
    if mask is None:
        return _Ids(array("i", ids), None)
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(value in (0, 1) for value in mask):
        raise BadDocument(f"'loss_mask' is not a list of {len(ids)} zeros and ones, one per id")
    if not any(mask):
        raise BadDocument("'loss_mask' is 0 everywhere, so no token would count in the loss")
    return _Ids(array("i", ids), bytearray(map(int, mask)))


def _json_document(text: str, json_key: str, reader: ImageReader | None) -> tuple[str | Chat | _Ids, bool]:
    """Return (the text, the chat or the ids of a JSONL line, whether it is truncated)."""
    try:
        line = json.loads(text)
        is_unicode = _is_unicode(text, line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON: {error}") from error
    if not isinstance(line, dict):
        raise BadDocument(f"expected a JSON object with 'text', 'messages' or 'input_ids', found {type(line).__name__}")
    line = with_messages(line)
    # Libraries that write tables give each line every key; those that a line lacks are null.
    keys = [k for k in JSON_KEYS[1:] if line.get(k) is not None] if json_key == "auto" else [json_key]
    if len(keys) > 1:
        raise BadDocument(f"has both {' and '.join(map(repr, keys))}; choose one with --json-key")
    if not keys or line.get(keys[0]) is None:
        expected = "'text', 'messages' or 'input_ids'" if json_key == "auto" else repr(json_key)
        keys = [key[:50] for key in sorted(line) if line[key] is not None]
        raise BadDocument(f"has no {expected}; its keys that are not null are {keys[:10]}")
    if not is_unicode:
        raise BadDocument("has a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode")
    if keys[0] == "messages":
        line, images = (line, None) if reader is None else take_images(line, reader)
        chat = parse_chat(line, images)
        return chat, chat.is_truncated
    if keys[0] == "input_ids":
        return _parse_ids(line), False
    if not isinstance(line["text"], str):
        raise BadDocument(f"'text' is {type(line['text']).__name__}, expected a string")
    return line["text"], line.get("finish") == "length"


def _is_unicode(json_text: str, value: Any) -> bool:
    """Whether no string of the JSON value decodes to a lone surrogate (only an escape can produce one)."""
    if "\\u" not in json_text:
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
