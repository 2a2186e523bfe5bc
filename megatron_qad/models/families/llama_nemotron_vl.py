"""Llama Nemotron Nano VL (``Llama_Nemotron_Nano_VL``): a Llama language model with a RADIO vision encoder.

The language model's Hugging Face names start with ``language_model.``. The projector is LayerNorm, linear, GELU,
linear, and the grid of tiles weighs an image's area and its aspect ratio (``radio_vision``).
"""

from dataclasses import replace
from functools import partial

from megatron_qad.models.families import llama, radio_vision
from megatron_qad.models.families.base import Family, ParamMapping
from megatron_qad.models.families.radio_vision import language_config

_PREFIX = "language_model."
vision = partial(radio_vision.vision_settings, projector="gelu", grid_rule="area_weighted")
_LLAMA = llama.FAMILY


def megatron_args(config: dict) -> dict:
    passthrough_tensors(config)  # raises now instead of at the export if the config is incomplete
    return _LLAMA.megatron_args(language_config(config))


def tensors(config: dict) -> list[ParamMapping]:
    mappings = _LLAMA.tensors(language_config(config))
    return [replace(mapping, hf=tuple(f"{_PREFIX}{name}" for name in mapping.hf)) for mapping in mappings]


def passthrough_tensors(config: dict) -> list[ParamMapping]:
    return radio_vision.passthrough_tensors(vision(config))


FAMILY = Family(
    architecture="Llama_Nemotron_Nano_VL",
    model_type="Llama_Nemotron_Nano_VL",
    layer_pattern=lambda config: _LLAMA.layer_pattern(language_config(config)),
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=lambda config: _LLAMA.rope_scaling(language_config(config)),
    text_config=language_config,
    passthrough_prefixes=("vision_model.", "mlp1."),
    passthrough_tensors=passthrough_tensors,
    vision=vision,
    config_keys=frozenset({"llm_config", "vision_config", "vit_hidden_size", "projector_hidden_size"}),
)
