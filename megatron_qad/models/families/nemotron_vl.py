"""Nemotron Nano VL (``NemotronH_Nano_VL_V2``): a Nemotron-H language model with a RADIO vision encoder.

Policies apply to the language model, which has the same Megatron names as a stand-alone Nemotron-H; its Hugging Face
names start with ``language_model.``. The vision encoder and the projector (``mlp1``) stay in BF16 under every policy.
They are not part of the Megatron model, so their tensors have the same name on both sides, and they are passed from
import to export unchanged: the language model is distilled on text, without images.

The encoder is the ViT-H/16 of C-RADIOv2. ``vision_config`` does not contain its depth and width, so the defaults are
defined here; keys of the same names override them.
"""

from collections.abc import Iterator

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import nemotron_h
from megatron_qad.models.families.base import Family, ParamMapping

_PREFIX = "language_model."
_VISION = "vision_model.radio_model.model"
_DEFAULTS = {
    "num_hidden_layers": 32,
    "intermediate_size": 5120,
    "patch_size": 16,
    "max_resolution": 2048,
    "num_cls_tokens": 10,
}


def language_config(config: dict) -> dict:
    """Return the config of the language model inside the vision-language config."""
    key = "text_config" if config.get("llm_config") is None and config.get("text_config") is not None else "llm_config"
    return values.section(config, key)


def layer_pattern(config: dict) -> str:
    return nemotron_h.layer_pattern(language_config(config))


def megatron_args(config: dict) -> dict:
    inner = language_config(config)
    if values.flag(inner, "tie_word_embeddings", False):
        raise QADError(f"{values.place(inner)}: tie_word_embeddings is not supported. This family has an untied head.")
    passthrough_tensors(config)  # raises now instead of at the export if the config is incomplete
    return nemotron_h.megatron_args(inner)


def tensors(config: dict) -> list[ParamMapping]:
    return nemotron_h.tensors(language_config(config), _PREFIX)


def passthrough_tensors(config: dict) -> list[ParamMapping]:
    return [*_vision_encoder(config), *_projector(config)]


def _vision_encoder(config: dict) -> Iterator[ParamMapping]:
    section = values.section(config, "vision_config")
    sizes = {key: values.integer(section, key, size) for key, size in _DEFAULTS.items()}
    num_blocks = values.integer(section, "num_hidden_layers", sizes["num_hidden_layers"], maximum=values.MAX_LAYERS)
    width = values.integer(config, "vit_hidden_size")
    ffn, patch = sizes["intermediate_size"], 3 * sizes["patch_size"] ** 2
    grid = (sizes["max_resolution"] // sizes["patch_size"]) ** 2
    yield _passthrough(f"{_VISION}.patch_generator.cls_token.token", (sizes["num_cls_tokens"], width))
    yield _passthrough(f"{_VISION}.patch_generator.pos_embed", (1, grid, width))
    yield _passthrough(f"{_VISION}.patch_generator.embedder.weight", (width, patch), never_quantized=True)
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (ffn, width),
        "mlp.fc2": (width, ffn),
    }
    for block in range(num_blocks):
        name = f"{_VISION}.blocks.{block}"
        for module, shape in linears.items():
            yield _passthrough(f"{name}.{module}.weight", shape, never_quantized=True)
            yield _passthrough(f"{name}.{module}.bias", shape[:1])
        for norm in ("norm1", "norm2"):
            yield _passthrough(f"{name}.{norm}.weight", (width,))
            yield _passthrough(f"{name}.{norm}.bias", (width,))


def _projector(config: dict) -> Iterator[ParamMapping]:
    """Yield the tensors of norm, linear, squared ReLU, linear. The input is a square of concatenated patches."""
    side = round(1 / values.number(config, "downsample_ratio", 0.5, above=0.01, maximum=1))
    width = values.integer(config, "vit_hidden_size") * side**2
    middle = values.integer(config, "projector_hidden_size")
    yield _passthrough("mlp1.0.weight", (width,))
    yield _passthrough("mlp1.1.weight", (middle, width), never_quantized=True)
    yield _passthrough(
        "mlp1.3.weight", (values.integer(language_config(config), "hidden_size"), middle), never_quantized=True
    )


def _passthrough(name: str, shape: tuple[int, ...], **kwargs) -> ParamMapping:
    return ParamMapping(name, (name,), "vision", shape, **kwargs)


FAMILY = Family(
    architecture="NemotronH_Nano_VL_V2",
    model_type="NemotronH_Nano_VL_V2",
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=nemotron_h.FAMILY.rope_scaling,
    text_config=language_config,
    passthrough_prefixes=("vision_model.", "mlp1.", f"{_PREFIX}mtp."),
    passthrough_tensors=passthrough_tensors,
    config_keys=frozenset({"llm_config", "vision_config", "vit_hidden_size", "projector_hidden_size"}),
)
