"""Features of the images in microbatches, computed once for the teacher and the student.

The encoder is on the ranks of the first pipeline stage, complete on each of them. The tiles of a microbatch are divided
among the tensor- and context-parallel ranks, which all need all features, and gathered. The features of a step's
microbatches stay on the device until the step ends.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.training import print_rank_0
from safetensors import safe_open
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.radio_vision import ENCODER, PROJECTOR, VisionSettings
from megatron_qad.models.vision.encoder import VisionEncoder


class ImageEncoder:
    """The vision encoder of a job. It loads its weights when the first image arrives.

    Args:
        settings: of the student's model.
        weights: files with the vision tensors of the job's models, which the import wrote. They must be equal.
        dtype: precision of the weights and the features.
        align_corners: see ``models.vision.radio_weights.resize_positions``.
    """

    def __init__(
        self, settings: VisionSettings, weights: Sequence[Path], dtype: torch.dtype, align_corners: bool = False
    ):
        self.settings, self._weights, self._dtype, self._align_corners = settings, weights, dtype, align_corners

    @cached_property
    def _model(self) -> VisionEncoder:
        first, *others = dict.fromkeys(self._weights)
        tensors = _load(first)
        for other in others:
            if different := [name for name, tensor in _load(other).items() if not _is_equal(tensors.get(name), tensor)]:
                raise QADError(
                    f"{other}: {different[0]} differs from {first}. One vision encoder serves both models: give a "
                    "teacher and a student with the same one."
                )
        model = VisionEncoder(self.settings, tensors, self._dtype, self._align_corners)
        print_rank_0(f"megatron_qad: vision encoder and projector from {first}, frozen")
        return model.to(torch.cuda.current_device())

    def encode(self, tiles: Tensor) -> Tensor:
        """Return the features [n * tokens_per_tile, hidden] of tiles, uint8 [n, 3, side, side], equal on all ranks."""
        group = mpu.get_tensor_and_context_parallel_group()
        size, count = group.size(), len(tiles)
        if size == 1:
            return self._model(tiles)
        share = -(-count // size)
        ours = tiles[group.rank() * share : (group.rank() + 1) * share]
        per_tile, hidden = self.settings.tokens_per_tile, self.settings.hidden_size
        features = torch.zeros(share * per_tile, hidden, dtype=self._dtype, device=tiles.device)
        if len(ours):
            features[: len(ours) * per_tile] = self._model(ours)
        gathered = features.new_empty(size * share * per_tile, hidden)
        torch.distributed.all_gather_into_tensor(gathered, features, group=group)
        return gathered[: count * per_tile]


def _load(file: Path) -> dict[str, Tensor]:
    """Return the tensors of encoder and projector in a file."""
    if not file.is_file():
        raise QADError(f"{file} is missing: the vision encoder that the import wrote. Copy it from that checkpoint.")
    with safe_open(file, "pt") as stream:
        return {n: stream.get_tensor(n) for n in stream.keys() if n.startswith((f"{ENCODER}.", f"{PROJECTOR}."))}  # noqa: SIM118


def _is_equal(ours: Tensor | None, theirs: Tensor) -> bool:
    return ours is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


class MicrobatchImages:
    """The images of one microbatch: its tiles, until the features are first requested, and then the features.

    Args:
        encoder: computes the features.
        tiles: uint8 [n, 3, side, side], n > 0.
        feature_index: int64 [b, s/cp], feature of each token of this rank, -1 for text.
    """

    def __init__(self, encoder: ImageEncoder, tiles: Tensor | None, feature_index: Tensor):
        self._encoder, self._tiles, self.feature_index = encoder, tiles, feature_index

    @cached_property
    def features(self) -> Tensor:
        """[n * tokens_per_tile, hidden]"""
        features = self._encoder.encode(self._tiles)
        self._tiles = None
        return features


class JoinedImages(MicrobatchImages):
    """The images of several microbatches that run as one. Each part keeps its features.

    Args:
        parts: the images of each microbatch, None for one without images; at least one has some.
        shapes: shape [b, s/cp] of each microbatch's tokens.
        dim: dimension of the tokens along which the microbatches are joined.
    """

    def __init__(self, parts: Sequence[MicrobatchImages | None], shapes: Sequence[torch.Size], dim: int):
        self._parts = [part for part in parts if part is not None]
        device = self._parts[0].feature_index.device
        rows, offset = [], 0
        for part, shape in zip(parts, shapes, strict=True):
            if part is None:
                rows.append(torch.full(shape, -1, dtype=torch.int64, device=device))
                continue
            index = part.feature_index
            rows.append(torch.where(index >= 0, index + offset, index))
            offset += len(part.features)
        self.feature_index = torch.cat(rows, dim)

    @cached_property
    def features(self) -> Tensor:
        return torch.cat([part.features for part in self._parts])
