"""Reads the bytes of the images that a record names: local files, base64 text, members of a tar shard."""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_settings import ImageSettings

MAX_BYTES = 1 << 26
"""Largest image file in bytes."""
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_SHOWN = 80


@dataclass(frozen=True)
class ImageFile:
    """The bytes of an image as they were given, and the number of tiles that it becomes."""

    data: bytes
    num_tiles: int


@dataclass(frozen=True)
class ImageReader:
    """Reads and checks images.

    Args:
        settings: of the model.
        root: folder that must contain the local files.
        members: images of the record's sample in a tar shard, by their names.
    """

    settings: ImageSettings
    root: Path
    members: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, source: Any, where: str) -> ImageFile:
        """Return the image that ``source`` names.

        Args:
            source: a path, a ``file://`` or ``data:`` URL, an object with "url" or "path", or with "bytes": base64.
            where: place in the record, for errors.

        Raises:
            BadDocument: the file does not exist or is no readable image, or the source is a remote URL.
        """
        # Imported here so that commands print their help without loading NumPy and Pillow.
        from megatron_qad.data.images.image_decoding import decode_image
        from megatron_qad.data.images.tiling import count_tiles

        data, name = self._bytes(source, where)
        image = decode_image(data, f"{where}: {name}")
        return ImageFile(data, count_tiles(*image.size, self.settings))

    def _bytes(self, source: Any, where: str) -> tuple[bytes, str]:
        """Return (bytes, name for errors)."""
        if isinstance(source, dict):
            if isinstance(source.get("bytes"), str):
                path = source.get("path")
                return _from_base64(source["bytes"], where), f"the image {path!r}" if path else "the image"
            source = next((source[key] for key in ("url", "path") if source.get(key) is not None), source)
        if not isinstance(source, str) or not source:
            raise BadDocument(f"{where}: expected a path, a data URL or bytes of an image, found {_short(source)}")
        if (member := self._member(source)) is not None:
            return self.members[member], f"the member {member!r}"
        if source.startswith("data:"):
            head, comma, text = source.partition(",")
            if not comma or not head.endswith(";base64"):
                raise BadDocument(f"{where}: the data URL {_short(source)} is not 'data:image/...;base64,...'")
            return _from_base64(text, where), "the image of the data URL"
        if source.startswith("file://"):
            return self._local(unquote(source.removeprefix("file://").removeprefix("localhost")), where)
        if _SCHEME.match(source):
            raise BadDocument(
                f"{where}: {_short(source)} is not a local file. Images are not downloaded: download them and give "
                "paths"
            )
        return self._local(source, where)

    def _member(self, name: str) -> str | None:
        """Return the member of the sample with this file name, or with this suffix, such as "jpg" or "left.png"."""
        names = {member.rpartition("/")[2]: member for member in self.members}
        by_suffix = {file.partition(".")[2]: member for file, member in names.items()}
        return names.get(name.rpartition("/")[2], by_suffix.get(name))

    def _local(self, path: str, where: str) -> tuple[bytes, str]:
        root = os.path.abspath(self.root)
        file = os.path.abspath(os.path.join(root, path))
        if "\0" in path or os.path.commonpath([root, file]) != root:
            raise BadDocument(f"{where}: the file {_short(path)} is outside of {root}. Give a folder with --image-root")
        try:
            with open(file, "rb") as stream:
                return stream.read(MAX_BYTES + 1), f"the file {_short(path)}"
        except FileNotFoundError as error:
            raise BadDocument(f"{where}: the file {_short(path)} does not exist in {root}") from error
        except OSError as error:
            raise BadDocument(f"{where}: the file {_short(path)} cannot be read ({error.strerror})") from error


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadDocument(f"{where}: the base64 text of the image is damaged ({error})") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
