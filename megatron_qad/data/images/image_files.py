"""The image files of a prefix: the bytes of each image once, and which images each document has.

PREFIX_images.bin/.idx is an indexed dataset of uint8 with one document for each image: its file as it was given. Equal
files are stored once, found by their SHA-256. PREFIX_image_refs.bin/.idx is one of int32 with as many documents as
PREFIX: for each image of a document (offset of its first placeholder token, number of the image, number of its tiles).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.image_sources import ImageFile
from megatron_qad.data.metadata import image_refs_prefix, images_prefix


class ImageWriter:
    """Writes the image files of a prefix."""

    def __init__(self, prefix: str, settings: ImageSettings):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix, self._settings = prefix, settings
        self._numbers: dict[bytes, int] = {}
        self._images = IndexedDatasetBuilder(f"{images_prefix(prefix)}.bin", dtype=np.uint8)
        self._refs = IndexedDatasetBuilder(f"{image_refs_prefix(prefix)}.bin", dtype=np.int32)
        self.uses = self.tiles = self.documents = 0

    def add(self, images: Sequence[tuple[int, ImageFile]]) -> None:
        """Write the images of the next document."""
        refs = np.array([(offset, self._number(file.data), file.num_tiles) for offset, file in images], dtype=np.int32)
        self._refs.add_document(refs.reshape(-1), [refs.size])
        self.uses += len(images)
        self.tiles += sum(file.num_tiles for _, file in images)
        self.documents += bool(images)

    def _number(self, data: bytes) -> int:
        """Return the number of an image, which is written if it is new."""
        key = hashlib.sha256(data).digest()
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._images.add_document(np.frombuffer(data, dtype=np.uint8), [len(data)])
        return self._numbers[key]

    def finish(self) -> dict | None:
        """Close the files and return ``DataMetadata.images``. Without any image the files are removed: None."""
        prefixes = images_prefix(self._prefix), image_refs_prefix(self._prefix)
        for builder, prefix in zip((self._images, self._refs), prefixes, strict=True):
            builder.finalize(f"{prefix}.idx")
        if self.uses:
            counts = {"images": len(self._numbers), "uses": self.uses, "tiles": self.tiles, "documents": self.documents}
            return {"settings": self._settings.to_dict(), **counts}
        for prefix in prefixes:
            for suffix in (".bin", ".idx"):
                Path(prefix + suffix).unlink()
        return None


class StoredImages:
    """Reads the image files of a prefix."""

    def __init__(self, prefix: str, mmap: bool):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._images = IndexedDataset(images_prefix(prefix), multimodal=False, mmap=mmap)
        self._refs = IndexedDataset(image_refs_prefix(prefix), multimodal=False, mmap=mmap)

    def refs(self, document: int) -> np.ndarray:
        """Return int32 [images, 3] of a document: offset of the first placeholder, number of the image, tiles."""
        return self._refs.get(document).reshape(-1, 3).copy()  # the end of the dataset unmaps its file

    def data(self, image: int) -> bytes:
        """Return the bytes of an image's file.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= image < len(self._images):
            raise IndexError(image)
        return self._images.get(image).tobytes()
