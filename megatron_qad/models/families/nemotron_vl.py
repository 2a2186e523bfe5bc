"""Nemotron Nano VL (``NemotronH_Nano_VL_V2``): a Nemotron-H language model with a RADIO vision encoder.

Policies apply to the language model, which has the same Megatron names as a stand-alone Nemotron-H; its Hugging Face
names start with ``language_model.``. The vision encoder and the projector (``mlp1``) stay in BF16 under every policy.
They are not part of the Megatron model, so their tensors have the same name on both sides, and they are passed from
import to export unchanged: the language model is distilled on text, without images.

The encoder is the ViT-H/16 of C-RADIOv2. ``vision_config`` does not contain its depth and width, so the defaults are
defined here; keys of the same names override them.
"""

from collections.abc import Iterator

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import nemotron_h
from megatron_qad.models.families.base import Family, ParamMapping, required

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
    inner = config.get("llm_config") or config.get("text_config")
    return inner if inner is not None else required(config, "llm_config")


def layer_pattern(config: dict) -> str:
    return nemotron_h.layer_pattern(language_config(config))


def megatron_args(config: dict) -> dict:
    inner = language_config(config)
    if inner.get("tie_word_embeddings"):
        raise QADError(
            "config.json: tie_word_embeddings in llm_config is not supported. This family has an untied head."
        )
    passthrough_tensors(config)  # raises now instead of at the export if the config is incomplete
    return nemotron_h.megatron_args(inner)


def tensors(config: dict) -> list[ParamMapping]:
    return nemotron_h.tensors(language_config(config), _PREFIX)


def passthrough_tensors(config: dict) -> list[ParamMapping]:
    return [*_vision_encoder(config), *_projector(config)]


def _vision_encoder(config: dict) -> Iterator[ParamMapping]:
    vision = _DEFAULTS | {k: v for k, v in required(config, "vision_config").items() if v is not None}
    width = required(config, "vit_hidden_size")
    ffn, patch = vision["intermediate_size"], 3 * vision["patch_size"] ** 2
    grid = (vision["max_resolution"] // vision["patch_size"]) ** 2
    yield _passthrough(f"{_VISION}.patch_generator.cls_token.token", (vision["num_cls_tokens"], width))
    yield _passthrough(f"{_VISION}.patch_generator.pos_embed", (1, grid, width))
    yield _passthrough(f"{_VISION}.patch_generator.embedder.weight", (width, patch), never_quantized=True)
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (ffn, width),
        "mlp.fc2": (width, ffn),
    }
    for block in range(vision["num_hidden_layers"]):
        name = f"{_VISION}.blocks.{block}"
        for module, shape in linears.items():
            yield _passthrough(f"{name}.{module}.weight", shape, never_quantized=True)
            yield _passthrough(f"{name}.{module}.bias", shape[:1])
        for norm in ("norm1", "norm2"):
            yield _passthrough(f"{name}.{norm}.weight", (width,))
            yield _passthrough(f"{name}.{norm}.bias", (width,))


def _projector(config: dict) -> Iterator[ParamMapping]:
    """Yield the tensors of norm, linear, squared ReLU, linear. The input is a square of concatenated patches."""
    side = round(1 / config.get("downsample_ratio", 0.5))
    width = required(config, "vit_hidden_size") * side**2
    middle = required(config, "projector_hidden_size")
    yield _passthrough("mlp1.0.weight", (width,))
    yield _passthrough("mlp1.1.weight", (middle, width), never_quantized=True)
    yield _passthrough(
        "mlp1.3.weight", (required(language_config(config), "hidden_size"), middle), never_quantized=True
    )


def _passthrough(name: str, shape: tuple[int, ...], **kwargs) -> ParamMapping:
    return ParamMapping(name, (name,), "vision", shape, **kwargs)


FAMILY = Family(
    architecture="NemotronH_Nano_VL_V2",
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=nemotron_h.FAMILY.rope_scaling,
    text_config=language_config,
    passthrough_prefixes=("vision_model.", "mlp1.", f"{_PREFIX}mtp."),
    passthrough_tensors=passthrough_tensors,
)
