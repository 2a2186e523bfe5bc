"""The frozen vision encoder and projector of a vision-language model: tiles of images to features.

The encoder is transformers' ``RadioModel``. Tiles have one size, so its table of position embeddings is resized once,
when the weights are loaded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_qad.models.families.radio_vision import PROJECTOR, VisionSettings
from megatron_qad.models.vision.radio_weights import radio_state


class VisionEncoder(nn.Module):
    """Computes the features of tiles, without gradients and always in evaluation mode.

    Args:
        settings: sizes of the model.
        tensors: its vision tensors by their names on the Hugging Face Hub, in any dtype.
        dtype: precision of the weights and the features.
        align_corners: how the table of position embeddings is resized, see ``radio_weights.resize_positions``.

    Raises:
        QADError: a tensor is missing or has a wrong shape.

    Example::

        encoder = VisionEncoder(settings, tensors, torch.bfloat16)
        features = encoder(torch.zeros(2, 3, 512, 512, dtype=torch.uint8))  # [2 * 256, hidden]
    """

    def __init__(
        self, settings: VisionSettings, tensors: Mapping[str, Tensor], dtype: torch.dtype, align_corners: bool = False
    ):
        from transformers.models.radio import RadioModel

        super().__init__()
        self.settings, self.dtype = settings, dtype
        with torch.device("meta"):  # no memory and no random values before the weights are there
            self.radio = RadioModel(radio_config(settings))
            self.projector = _projector(settings)
        self.radio.make_preprocessor_external()  # normalized here, in float32
        state = radio_state(settings, tensors, align_corners)
        state["summary_idxs"] = torch.zeros(1, dtype=torch.long)  # of an output that is not used
        self.radio.load_state_dict({name: _cast(tensor, dtype) for name, tensor in state.items()}, assign=True)
        weights = {name.removeprefix(f"{PROJECTOR}."): t for name, t in tensors.items() if name.startswith(PROJECTOR)}
        self.projector.load_state_dict({name: _cast(tensor, dtype) for name, tensor in weights.items()}, assign=True)
        self.register_buffer("mean", torch.tensor(settings.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Keep the evaluation mode: in training mode RADIO's position embeddings are cropped at random."""
        return self

    @torch.no_grad()
    def forward(self, tiles: Tensor) -> Tensor:
        """Return the features of tiles.

        Args:
            tiles: RGB values, uint8 [n, 3, tile_size, tile_size].

        Returns:
            [n * tokens_per_tile, hidden_size] in the encoder's dtype, tile by tile, rows before columns.
        """
        pixels = (tiles.float() / 255 - self.mean) / self.std
        patches = self.radio(pixels.to(self.dtype)).features  # [n, patches, width]
        return self.projector(join_patches(patches, self.settings.patches_per_side)).flatten(0, 1)


def radio_config(settings: VisionSettings):
    """Return transformers' ``RadioConfig`` of an encoder whose images have the size of a tile."""
    from transformers.models.radio import RadioConfig

    return RadioConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.num_blocks,
        num_attention_heads=settings.num_heads,
        mlp_ratio=(settings.ffn + 0.5) / settings.width,  # RadioModel rounds the product down
        patch_size=settings.patch_size,
        max_img_size=settings.tile_size,
        num_cls_tokens=settings.num_prefix_tokens,
        num_registers=0,
        summary_idxs=[0],
        norm_mean=settings.mean,
        norm_std=settings.std,
    )


def join_patches(patches: Tensor, side: int) -> Tensor:
    """Concatenate each square of ``side`` x ``side`` patches of a square image (pixel shuffle, version 2).

    Args:
        patches: [n, rows * columns, width], rows before columns.

    Returns:
        [n, rows * columns / side^2, side^2 * width]; the patches of a square follow each other row by row.
    """
    count, num_patches, width = patches.shape
    squares = round(num_patches**0.5) // side
    grid = patches.reshape(count, squares, side, squares, side, width)
    return grid.transpose(2, 3).reshape(count, squares * squares, side * side * width)


class _SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def _projector(settings: VisionSettings) -> nn.Sequential:
    """Return the projector; the indices of its modules are those of the tensors' names."""
    width, middle, hidden = settings.projector_inputs, settings.projector_width, settings.hidden_size
    if settings.projector == "squared_relu":
        norm, activation, bias = nn.RMSNorm(width, eps=1e-5), _SquaredReLU(), False
    else:
        norm, activation, bias = nn.LayerNorm(width), nn.GELU(), True
    return nn.Sequential(norm, nn.Linear(width, middle, bias=bias), activation, nn.Linear(middle, hidden, bias=bias))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
