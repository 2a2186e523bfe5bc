"""The images of a row: the feature of each token, and the pixels of the tiles, decoded in the data workers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_decoding import decode_image
from megatron_qad.data.images.image_files import StoredImages
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.tiles import Tiles
from megatron_qad.data.images.tiling import cut_tiles


class RowImages:
    """Reads the images of the rows of one prefix.

    Args:
        prefix: of data with images, or None for data without.
        settings: of the model.
        mmap: whether files are mapped into memory.
    """

    def __init__(self, prefix: str | None, settings: ImageSettings, mmap: bool):
        self._prefix, self._settings = prefix, settings
        self._stored = None if prefix is None else StoredImages(prefix, mmap)

    def feature_index(self, tokens: Tensor, documents: Sequence[tuple[int, int]]) -> tuple[Tensor, list[np.ndarray]]:
        """Return (int64 [s], references of the images of the row).

        Args:
            tokens: int64 [s] of a row.
            documents: (document, length) of the whole documents at its start.

        Returns:
            -1 for a token of text, or the number of its feature in the row: tile times ``tokens_per_tile`` + place in
            the tile; and (offset in the document, image, tiles) of each image.

        Raises:
            BadDocument: a document's image tokens are not those of its images.
        """
        index, refs, begin, feature = torch.full_like(tokens, -1), [], 0, 0
        for document, length in documents if self._stored is not None else ():
            own = self._stored.refs(document)
            ids, placed = tokens[begin : begin + length], index[begin : begin + length]
            for offset, _, tiles in own.tolist():
                size = tiles * self._settings.tokens_per_tile
                placed[offset : offset + size] = torch.arange(feature, feature + len(placed[offset : offset + size]))
                feature += size
            is_image = ids == self._settings.image_token_id
            num_features = int(own[:, 2].sum()) * self._settings.tokens_per_tile
            if not torch.equal(is_image, placed >= 0) or int(is_image.sum()) != num_features:
                raise BadDocument(
                    f"document {document} has {int(is_image.sum())} tokens {self._settings.image_token} (id "
                    f"{self._settings.image_token_id}) where its {len(own)} images have {num_features} features"
                )
            refs += list(own)
            begin += length
        return index, refs

    def tiles(self, refs: Sequence[np.ndarray], decodes: bool) -> Tiles:
        """Return the tiles of a row's images, without pixels unless ``decodes``.

        Raises:
            BadDocument: an image does not exist, cannot be decoded, or has another number of tiles.
        """
        size = self._settings.tile_size
        pixels = [self._decoded(int(image), int(tiles)) for _, image, tiles in refs] if decodes else []
        joined = (
            torch.from_numpy(np.concatenate(pixels)) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        )
        return Tiles(joined, torch.tensor([sum(int(tiles) for *_, tiles in refs)]))

    def _decoded(self, image: int, num_tiles: int) -> np.ndarray:
        try:
            data = self._stored.data(image)
        except IndexError as error:
            raise BadDocument(f"image {image} does not exist") from error
        tiles = cut_tiles(decode_image(data, f"image {image}"), self._settings)
        if len(tiles) != num_tiles:
            raise BadDocument(f"image {image} has {len(tiles)} tiles, but its document has places for {num_tiles}")
        return tiles
