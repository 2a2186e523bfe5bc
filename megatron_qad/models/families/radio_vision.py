"""The vision side of Nemotron VL models: a C-RADIO encoder (a ViT) and a projector, ``mlp1``.

An image is cut into square tiles. The encoder makes a vector of each patch of a tile, ``downsample_ratio`` joins
squares of neighboring patches, and the projector maps each of them to one input vector of the language model: a
feature. One placeholder token holds its place in the text.

``vision_config`` names the encoder's ViT instead of its sizes (``args.model``); without a name it is the ViT-H/16 of
C-RADIOv2. Keys with transformers' names for sizes override them. Both parts stay in BF16 under every policy and are
never trained. They are not part of the Megatron model: their tensors have the same name on both sides and are passed
from import to export unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import ParamMapping

_VITS = {
    "vit_small_patch16_224": (12, 384, 6, 1536),
    "vit_base_patch16_224": (12, 768, 12, 3072),
    "vit_large_patch16_224": (24, 1024, 16, 4096),
    "vit_huge_patch16_224": (32, 1280, 16, 5120),
}
"""Blocks, width, heads and inner width of each ViT, by its name in timm."""
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


def language_config(config: dict) -> dict:
    """Return the config of the language model inside the vision-language config."""
    key = "text_config" if config.get("llm_config") is None and config.get("text_config") is not None else "llm_config"
    return values.section(config, key)


def vision_settings(config: dict, *, projector: str, grid_rule: str) -> VisionSettings:
    """Return the settings of a vision-language ``config``.

    Args:
        projector, grid_rule: of the family, see ``VisionSettings``.

    Raises:
        QADError: an entry that is missing, has another type, or contradicts another.
    """
    section = values.section(config, "vision_config")
    args = values.section(section, "args", None) or {}
    name = "vit_huge_patch16_224" if "model" not in args else values.text(args, "model")
    if name not in _VITS:
        raise QADError(f"{values.place(args)}: model is {name!r:.100}, expected one of {', '.join(_VITS)}.")
    blocks, vit_width, heads, ffn = _VITS[name]
    width = values.integer(config, "vit_hidden_size")
    if "model" in args and width != vit_width:
        raise QADError(f"{values.place(config)}: vit_hidden_size is {width}, but {name} has the width {vit_width}.")
    patch = values.integer(config, "patch_size", values.integer(section, "patch_size", 16))
    positions = values.integer(section, "max_resolution", 2048)
    settings = VisionSettings(
        num_blocks=values.integer(section, "num_hidden_layers", blocks, maximum=values.MAX_LAYERS),
        width=width,
        num_heads=values.integer(section, "num_attention_heads", heads),
        ffn=values.integer(section, "intermediate_size", ffn),
        patch_size=patch,
        tile_size=values.integer(config, "force_image_size", 512),
        table_side=values.integer(args, "cpe_max_size", positions) // patch,
        num_prefix_tokens=values.integer(section, "num_cls_tokens", _num_prefix_tokens(args)),
        patches_per_side=round(1 / values.number(config, "downsample_ratio", 0.5, above=0.01, maximum=1)),
        projector=projector,
        projector_width=values.integer(config, "projector_hidden_size"),
        hidden_size=values.integer(language_config(config), "hidden_size"),
        grid_rule=grid_rule,
        max_tiles=values.integer(config, "max_dynamic_patch", 12),
        use_thumbnail=values.flag(config, "use_thumbnail", True),
        image_token=values.text(config, "img_context_token", "<image>"),
        mean=_channels(config, "norm_mean", _CLIP_MEAN),
        std=_channels(config, "norm_std", _CLIP_STD),
    )
    if (version := values.text(config, "ps_version", "v2")) != "v2":
        raise QADError(f"{values.place(config)}: ps_version is {version!r:.100}. Only 'v2' is supported.")
    return settings


def _num_prefix_tokens(args: dict) -> int:
    """Return the number of class tokens, one for each teacher, and of the registers that complete a multiple."""
    if "register_multiple" not in args:
        return 10
    teachers = {str(entry.get("name")) for entry in values.entries(args, "teachers")} if "teachers" in args else {""}
    num_classes = len(teachers) if values.flag(args, "cls_token_per_teacher", True) else 1
    multiple = values.integer(args, "register_multiple")
    return num_classes + multiple - num_classes % multiple


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
