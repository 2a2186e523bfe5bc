"""Nemotron Nano VL (``NemotronH_Nano_VL_V2``): a Nemotron-H language model with a RADIO vision encoder.

Policies apply to the language model, which has the same Megatron names as a stand-alone Nemotron-H; its Hugging Face
names start with ``language_model.``. ``radio_vision`` describes the encoder and the projector.
"""

from functools import partial

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import nemotron_h, radio_vision
from megatron_qad.models.families.base import Family, ParamMapping
from megatron_qad.models.families.radio_vision import language_config

_PREFIX = "language_model."
vision = partial(radio_vision.vision_settings, projector="squared_relu", grid_rule="closest_ratio")


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
    return radio_vision.passthrough_tensors(vision(config))


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
    vision=vision,
    config_keys=frozenset({"llm_config", "vision_config", "vit_hidden_size", "projector_hidden_size"}),
)
