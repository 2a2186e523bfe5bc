"""C-RADIO's weights by their names on the Hugging Face Hub -> the state of transformers' ``RadioModel``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.radio_vision import ENCODER, VisionSettings, passthrough_tensors

_EMBEDDINGS = {
    "patch_generator.embedder.weight": "embeddings.patch_projection.weight",
    "patch_generator.cls_token.token": "embeddings.cls_register_token",
}
_BLOCK = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_BLOCK |= {"norm1": "norm1", "norm2": "norm2"}
_QKV = ("query", "key", "value")


def radio_state(settings: VisionSettings, tensors: Mapping[str, Tensor], align_corners: bool) -> dict[str, Tensor]:
    """Return the state of a ``RadioModel`` whose images have the size of a tile, without the buffers of its input.

    Args:
        tensors: the vision tensors of a checkpoint, by their names on the Hub.
        align_corners: see ``resize_positions``.

    Raises:
        QADError: a tensor of encoder or projector is missing or has a wrong shape.
    """
    for expected in passthrough_tensors(settings):
        found = tensors.get(expected.megatron)
        if found is None:
            raise QADError(f"{expected.megatron}: is missing from the model's vision tensors. Import the model again.")
        if tuple(found.shape) != expected.shape:
            raise QADError(
                f"{expected.megatron}: has shape {list(found.shape)}, but the config implies {list(expected.shape)}. "
                "Correct config.json (vision_config) and import the model again."
            )
    model = f"{ENCODER}.model"
    state = {theirs: tensors[f"{model}.{hub}"] for hub, theirs in _EMBEDDINGS.items()}
    state["embeddings.position_embedding"] = resize_positions(
        tensors[f"{model}.patch_generator.pos_embed"], settings.tile_size // settings.patch_size, align_corners
    )
    for block in range(settings.num_blocks):
        hub, theirs = f"{model}.blocks.{block}", f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            for name, new in _BLOCK.items():
                state[f"{theirs}.{new}.{kind}"] = tensors[f"{hub}.{name}.{kind}"]
            parts = tensors[f"{hub}.attn.qkv.{kind}"].chunk(3)
            state |= {
                f"{theirs}.attention.attention.{n}.{kind}": part.contiguous()
                for n, part in zip(_QKV, parts, strict=True)
            }
        for i in (1, 2):  # C-RADIO has no layer scale
            state[f"{theirs}.layer_scale{i}.lambda1"] = torch.ones(settings.width)
    return state


def resize_positions(table: Tensor, side: int, align_corners: bool) -> Tensor:
    """Resize the square table of position embeddings [1, n^2, width] to [1, side^2, width], bilinearly in float32.

    Sources differ in ``align_corners``. NVlabs/RADIO evaluates with False since 2025-06-28 and with True before, and
    vLLM, TensorRT-LLM and transformers use False. The code that a checkpoint carries decides what its training saw.
    """
    rows = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, rows, rows, -1).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=align_corners)
    return resized.flatten(2).transpose(1, 2).to(table.dtype).contiguous()
