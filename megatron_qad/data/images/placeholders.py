"""Placeholder tokens of images: from a rendered chat to tokens, and from tokens to the place of each image.

In the rendered text an image is the image token. It becomes what servers tokenize: the start token, one image token for
each feature, and the end token. A literal image token in a message is cut after its first character before it is
tokenized, so that it becomes ordinary tokens and not the special one.
"""

import re
from array import array
from collections.abc import Callable, Sequence

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_parts import ChatImages
from megatron_qad.data.images.image_settings import ImageSettings

Span = tuple[int, int]


def expand(text: str, spans: Sequence[Span], images: ChatImages, num_images: int) -> tuple[list[str], list[Span]]:
    """Return the pieces of a rendered text in which images are placeholders, and the moved character ranges.

    Args:
        text: rendered text with one image token for each image.
        spans: half-open, ascending character ranges of ``text``. None of them begins or ends inside of an image token.
        num_images: number of images that the text must have.

    Returns:
        (pieces that are tokenized one by one; ``spans`` in their concatenation).

    Raises:
        BadDocument: the text has another number of images.
    """
    settings = images.settings
    pattern = re.compile("|".join([_image_pattern(settings), re.escape(images.literal)]))
    pieces, moves, position, found, shift = [""], [], 0, 0, 0
    for match in pattern.finditer(text):
        pieces[-1] += text[position : match.start()]
        if match.group() == images.literal:
            shown = settings.image_token
            pieces[-1] += shown[:1]
            pieces.append(shown[1:])
        else:
            shown = _placeholders(settings, images.files[found].num_tiles) if found < len(images.files) else ""
            pieces[-1] += shown
            found += 1
        position = match.end()
        moves.append((match.end(), shift := shift + len(shown) - (match.end() - match.start())))
    pieces[-1] += text[position:]
    if found != num_images:
        raise BadDocument(
            f"the chat template renders {found} places for images, but the messages have {num_images} images"
        )
    return pieces, [(_moved(start, moves), _moved(end, moves)) for start, end in spans]


def _image_pattern(settings: ImageSettings) -> str:
    """Return a pattern of an image in a rendered text; some templates write the start and the end token, too."""
    start, end = (f"(?:{re.escape(token)})?" for token in (settings.start_token, settings.end_token))
    return f"{start}{re.escape(settings.image_token)}{end}"


def _placeholders(settings: ImageSettings, num_tiles: int) -> str:
    features = settings.image_token * (num_tiles * settings.tokens_per_tile)
    return settings.start_token + features + settings.end_token


def _moved(position: int, moves: Sequence[Span]) -> int:
    """Return a position of the old text in the new one; ``moves`` has (end of a replaced part, shift after it)."""
    return position + next((shift for end, shift in reversed(moves) if end <= position), 0)


def locate_images(ids: array, num_tiles: Sequence[int], settings: ImageSettings) -> list[int]:
    """Return the offset of the first image token of each image of a document.

    Args:
        ids: tokens of a document.
        num_tiles: number of tiles of the images that it may have. The document has all of them or the first ones.

    Raises:
        BadDocument: the document's image tokens are not those of its images.
    """
    offsets, position, image = [], 0, settings.image_token_id
    for tiles in num_tiles:
        try:
            position = ids.index(image, position)
        except ValueError:
            break
        length = tiles * settings.tokens_per_tile
        end = position + length
        around = ids[position - 1 : position].tolist() + ids[end : end + 1].tolist()
        is_whole = ids[position:end] == array(ids.typecode, [image]) * length
        if not is_whole or around != [settings.start_token_id, settings.end_token_id]:
            raise BadDocument(
                f"image {len(offsets)} is not {settings.start_token}, {length} times {settings.image_token}, and "
                f"{settings.end_token} in the tokens; the tokenizer does not have them as special tokens"
            )
        offsets.append(position)
        position = end
    if ids.count(image) != sum(num_tiles[: len(offsets)]) * settings.tokens_per_tile:
        raise BadDocument(
            f"has {ids.count(image)} tokens {settings.image_token} (id {image}), but its {len(offsets)} images have "
            f"{sum(num_tiles[: len(offsets)]) * settings.tokens_per_tile} features"
        )
    return offsets


def mask_images(mask: bytearray, offsets: Sequence[int], num_tiles: Sequence[int], settings: ImageSettings) -> None:
    """Clear the loss mask at the tokens of images and those around them."""
    for offset, tiles in zip(offsets, num_tiles, strict=False):
        end = offset + tiles * settings.tokens_per_tile + 1
        mask[offset - 1 : end] = bytes(end - offset + 1)


def encode_literally(text: str, token: str, encode: Callable[[str], array | list[int]], around: Span) -> array:
    """Return the ids of a text whose literal ``token`` becomes ordinary tokens.

    Args:
        encode: returns the ids of a text.
        around: numbers of special ids that ``encode`` adds before and after a text.
    """
    first, *others = text.split(token)
    pieces = [first + token[:1]] if others else [first]
    pieces += [token[1:] + piece + (token[:1] if i + 1 < len(others) else "") for i, piece in enumerate(others)]
    ids = array("i")
    for i, piece in enumerate(pieces):
        encoded = array("i", encode(piece))
        begin = 0 if i == 0 else around[0]
        end = len(encoded) - (0 if i + 1 == len(pieces) else around[1])
        ids += encoded[begin:end]
    return ids
