"""Finds the images of a record by their place, and marks literal image tokens in its texts.

After ``take_images`` an image is a part ``{"type": "image"}`` of a message's content, or the image token in content
that is a string. A literal image token in any text of the record is replaced by characters of a private-use area, so
that every image token in the rendered chat stands for an image; ``placeholders`` puts the literal tokens back.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.image_sources import ImageFile, ImageReader

IMAGE_PART = {"type": "image"}
"""An image in the content of a message, after ``take_images``."""
_PART_TYPES = ("image", "image_url", "input_image")
_SOURCE_KEYS = ("image_url", "image", "path", "url", "bytes")
_COLUMNS = ("images", "image")


@dataclass(frozen=True)
class ChatImages:
    """The images of a conversation."""

    settings: ImageSettings
    files: tuple[ImageFile, ...]
    """Images in the order of the text."""
    counts: tuple[int, ...]
    """Number of images in each message."""
    literal: str
    """What stands for a literal image token in the texts."""

    def count(self, end: int) -> int:
        """Return the number of images in the messages before message ``end``."""
        return sum(self.counts[:end])


def take_images(record: dict[str, Any], reader: ImageReader) -> tuple[dict[str, Any], ChatImages]:
    """Read the images of a record with "messages".

    The record has them in one of these forms:

    - Parts of content: ``{"type": "image_url", "image_url": {"url": ...}}`` or ``{"type": "image", "image": ...}``,
      with "path" or "url" instead of "image". A part without any of them is the next element of "images".
    - The image token in user messages that are strings, as many as the record's "image" or "images" has elements
      (LLaVA). Without that key the token is literal text.

    A sample of a tar shard whose record names no images has those of the sample, in the order of their names.

    Returns:
        (record without "image" and "images" whose messages are as the module says, its images).

    Raises:
        BadDocument: an image cannot be read, or the numbers of images and of places differ.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadDocument("'messages' is not a non-empty list of objects with a 'role'")
    given = _column(record)
    has_parts = any(_is_image(part) for message in messages for part in _parts(message))
    if not given and (not has_parts or any(_is_image(p) and _source(p) is None for m in messages for p in _parts(m))):
        given = sorted(reader.members)
    has_tokens = bool(given) and not has_parts
    if has_parts:
        messages, files, counts = _images_of_parts(messages, given, reader)
    else:
        files, counts = _images_of_tokens(messages, given, reader)
    rest = {key: value for key, value in record.items() if key not in (*_COLUMNS, "messages")}
    literal = _unused_text([messages, rest])
    token = reader.settings.image_token
    marked = _replace(rest, token, literal)
    marked["messages"] = [
        _replace(message, token, literal)
        | ({"content": message["content"]} if has_tokens and _is_user_text(message) else {})
        for message in messages
    ]
    return marked, ChatImages(reader.settings, tuple(files), tuple(counts), literal)


def split_at_tokens(text: str, token: str) -> list[dict[str, str]]:
    """Return a text with image tokens as parts, without the newline that LLaVA's files have next to a token.

    >>> split_at_tokens("<image>\\nWhat is it?", "<image>")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    """
    first, *others = text.split(token)
    parts = []
    for i, piece in enumerate([first, *others]):
        piece = piece.removeprefix("\n") if i else piece
        piece = piece.removesuffix("\n") if i < len(others) else piece
        parts += [dict(IMAGE_PART)] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _images_of_parts(
    messages: Sequence[dict[str, Any]], given: Sequence[Any], reader: ImageReader
) -> tuple[list[dict[str, Any]], list[ImageFile], list[int]]:
    """Return (messages whose image parts have no source, images, number of images in each message)."""
    remaining, files, counts, bare = list(given), [], [], []
    for i, message in enumerate(messages):
        before, parts = len(files), []
        for j, part in enumerate(_parts(message)):
            where = f"messages[{i}]: content[{j}]"
            if not _is_image(part):
                parts.append(part)
                continue
            if message.get("role") == "assistant":
                raise BadDocument(f"{where} is an image in a message of the assistant, which writes only text")
            source = _source(part)
            if source is None and not remaining:
                raise BadDocument(f"{where} names no image, and 'images' has no further one")
            files.append(reader.read(remaining.pop(0) if source is None else source, where))
            parts.append(dict(IMAGE_PART))
        counts.append(len(files) - before)
        bare.append(message | {"content": parts} if parts else message)
    if remaining:
        raise BadDocument(
            f"'images' has {len(given)} images, but the messages have {len(given) - len(remaining)} image parts "
            "without an image of their own"
        )
    return bare, files, counts


def _images_of_tokens(
    messages: Sequence[dict[str, Any]], given: Sequence[Any], reader: ImageReader
) -> tuple[list[ImageFile], list[int]]:
    """Return (images, number of images in each message) of a record with image tokens in its texts."""
    token = reader.settings.image_token
    if not given:
        return [], [0] * len(messages)
    counts = [message["content"].count(token) if _is_user_text(message) else 0 for message in messages]
    if sum(counts) != len(given):
        places = f"{sum(counts)} {'place' if sum(counts) == 1 else 'places'} for images ({token} in user messages)"
        raise BadDocument(f"has {places}, but {len(given)} {'image' if len(given) == 1 else 'images'}")
    return [reader.read(source, f"image {i}") for i, source in enumerate(given)], counts


def _column(record: dict[str, Any]) -> list[Any]:
    """Return the elements of the record's "images" or "image", which may be one image or a list."""
    keys = [key for key in _COLUMNS if record.get(key) not in (None, [], "")]
    if len(keys) > 1:
        raise BadDocument("has both 'image' and 'images'")
    given = record[keys[0]] if keys else []
    return given if isinstance(given, list) else [given]


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _PART_TYPES


def _source(part: dict[str, Any]) -> Any:
    """Return what a part says about its image, or None."""
    key = next((key for key in _SOURCE_KEYS if part.get(key) is not None), None)
    return part if key == "bytes" else None if key is None else part[key]


def _is_user_text(message: dict[str, Any]) -> bool:
    return message.get("role") == "user" and isinstance(message.get("content"), str)


def _unused_text(value: Any) -> str:
    """Return characters of a private-use area that no text of the value contains."""
    text, number = json.dumps(value, ensure_ascii=False), 0
    while (literal := f"\ue000literal{number}\ue001") in text:
        number += 1
    return literal


def _replace(value: Any, old: str, new: str) -> Any:
    """Return a JSON value in whose strings ``old`` is replaced."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replace(item, old, new) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, old, new) for key, item in value.items()}
    return value
