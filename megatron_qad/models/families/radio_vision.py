"""The vision side of Nemotron VL models: a C-RADIO encoder (a ViT) and a projector, ``mlp1``.

An image is cut into square tiles. The encoder makes a vector of each patch of a tile, ``downsample_ratio`` joins
squares of neighboring patches, and the projector maps each of them to one input vector of the language model: a
feature. One placeholder token holds its place in the text.

The encoder is the ViT-H/16 of C-RADIOv2. ``vision_config`` does not contain its depth and width, so the defaults are
defined here; keys of the same names override them. Both parts stay in BF16 under every policy and are never trained.
They are not part of the Megatron model: their tensors have the same name on both sides and are passed from import to
export unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import ParamMapping

ENCODER = "vision_model.radio_model"
PROJECTOR = "mlp1"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionSettings:
    """Sizes of the encoder and the projector, and how an image becomes tokens."""

    num_blocks: int
    width: int
    """Size of the encoder's hidden states."""
    num_heads: int
    ffn: int
    """Inner width of the encoder's MLPs."""
    patch_size: int
    """Side of a patch in pixels."""
    tile_size: int
    """Side of a tile in pixels."""
    table_side: int
    """Side of the square table of position embeddings, in patches."""
    num_prefix_tokens: int
    """Class and register tokens, whose outputs are not used."""
    patches_per_side: int
    """Side of the square of patches that one feature covers."""
    projector: str
    """"squared_relu": RMSNorm and linears without bias. "gelu": LayerNorm and linears with bias."""
    projector_width: int
    """Inner width of the projector."""
    hidden_size: int
    """Size of a feature, which is that of the language model's hidden states."""
    grid_rule: str
    """How the grid of tiles is chosen for an image (``data.images.tiling``)."""
    max_tiles: int
    """Largest number of tiles of an image, without the thumbnail."""
    use_thumbnail: bool
    """Whether an image of several tiles has one more tile, the whole image."""
    image_token: str
    mean: tuple[float, ...] = _CLIP_MEAN
    """Mean of each color channel for pixel values from 0 to 1."""
    std: tuple[float, ...] = _CLIP_STD
    """Standard deviation of each color channel."""

    @property
    def projector_inputs(self) -> int:
        """Size of the projector's input: the concatenated patches of one feature."""
        return self.width * self.patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Number of features, and so of placeholder tokens, of one tile."""
        return (self.tile_size // self.patch_size // self.patches_per_side) ** 2


def vision_settings(
    config: dict, *, hidden_size: int, projector: str, grid_rule: str, max_tiles: int = 12
) -> VisionSettings:
    """Return the settings of a vision-language ``config``.

    Args:
        hidden_size: of the language model.
        projector, grid_rule, max_tiles: of the family, see ``VisionSettings``.

    Raises:
        QADError: an entry that is missing, has another type, or contradicts another.
    """
    section = values.section(config, "vision_config")
    width = values.integer(config, "vit_hidden_size")
    patch = values.integer(config, "patch_size", values.integer(section, "patch_size", 16))
    settings = VisionSettings(
        num_blocks=values.integer(section, "num_hidden_layers", 32, maximum=values.MAX_LAYERS),
        width=width,
        num_heads=values.integer(section, "num_attention_heads", 16),
        ffn=values.integer(section, "intermediate_size", 5120),
        patch_size=patch,
        tile_size=values.integer(config, "force_image_size", 512),
        table_side=values.integer(section, "max_resolution", 2048) // patch,
        num_prefix_tokens=values.integer(section, "num_cls_tokens", 10),
        patches_per_side=round(1 / values.number(config, "downsample_ratio", 0.5, above=0.01, maximum=1)),
        projector=projector,
        projector_width=values.integer(config, "projector_hidden_size"),
        hidden_size=hidden_size,
        grid_rule=grid_rule,
        max_tiles=values.integer(config, "max_dynamic_patch", max_tiles),
        use_thumbnail=values.flag(config, "use_thumbnail", True),
        image_token=values.text(config, "img_context_token", "<image>"),
        mean=_channels(config, "norm_mean", _CLIP_MEAN),
        std=_channels(config, "norm_std", _CLIP_STD),
    )
    if (version := values.text(config, "ps_version", "v2")) != "v2":
        raise QADError(f"{values.place(config)}: ps_version is {version!r:.100}. Only 'v2' is supported.")
    return settings


def check_sizes(config: dict, settings: VisionSettings) -> None:
    """Check that tiles can be divided into features, and the encoder's width into heads: it is built for images only.

    Raises:
        QADError: they cannot.
    """
    unit = settings.patch_size * settings.patches_per_side
    if settings.tile_size % unit:
        raise QADError(
            f"{values.place(config)}: force_image_size {settings.tile_size} is not a multiple of {unit}, the side of "
            "a feature in pixels (patch_size / downsample_ratio)."
        )
    if settings.width % settings.num_heads:
        raise QADError(
            f"{values.place(config)}: vit_hidden_size {settings.width} is not a multiple of the encoder's "
            f"{settings.num_heads} heads (vision_config, num_attention_heads)."
        )


def passthrough_tensors(settings: VisionSettings) -> list[ParamMapping]:
    """Return the tensors of encoder and projector."""
    return [*_encoder(settings), *_projector(settings)]


def _channels(config: dict, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    given = config.get(key)
    if given is None:
        return default
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(x, int | float) for x in given):
        raise QADError(f"{values.place(config)}: {key} is {given!r:.100}, expected a list of three numbers.")
    return tuple(map(float, given))


def _encoder(settings: VisionSettings) -> Iterator[ParamMapping]:
    model, width, ffn = f"{ENCODER}.model", settings.width, settings.ffn
    yield _tensor(f"{model}.patch_generator.cls_token.token", (settings.num_prefix_tokens, width))
    yield _tensor(f"{model}.patch_generator.pos_embed", (1, settings.table_side**2, width))
    yield _tensor(f"{model}.patch_generator.embedder.weight", (width, 3 * settings.patch_size**2), is_linear=True)
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (ffn, width),
        "mlp.fc2": (width, ffn),
    }
    for block in range(settings.num_blocks):
        name = f"{model}.blocks.{block}"
        for module, shape in linears.items():
            yield from _linear(f"{name}.{module}", shape, has_bias=True)
        for norm in ("norm1", "norm2"):
            yield _tensor(f"{name}.{norm}.weight", (width,))
            yield _tensor(f"{name}.{norm}.bias", (width,))


def _projector(settings: VisionSettings) -> Iterator[ParamMapping]:
    has_bias = settings.projector == "gelu"
    width, middle = settings.projector_inputs, settings.projector_width
    yield _tensor(f"{PROJECTOR}.0.weight", (width,))
    if has_bias:
        yield _tensor(f"{PROJECTOR}.0.bias", (width,))
    yield from _linear(f"{PROJECTOR}.1", (middle, width), has_bias)
    yield from _linear(f"{PROJECTOR}.3", (settings.hidden_size, middle), has_bias)


def _linear(module: str, shape: tuple[int, int], has_bias: bool) -> Iterator[ParamMapping]:
    yield _tensor(f"{module}.weight", shape, is_linear=True)
    if has_bias:
        yield _tensor(f"{module}.bias", shape[:1])


def _tensor(name: str, shape: tuple[int, ...], *, is_linear: bool = False) -> ParamMapping:
    return ParamMapping(name, (name,), "vision", shape, never_quantized=is_linear)
