"""Compares the settings that a Megatron checkpoint was trained with to the model's ``config.json``.

Tensors do not show the rotary base, the epsilon of the norms, the number of heads or how the router scores. Megatron-LM
saves its arguments in the checkpoint. Megatron-Bridge saves ``run_config.yaml``, with other names for some of them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_qad.checkpoint.slice_reader import READ_ERRORS
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_yaml
from megatron_qad.models.families import family_of, text_config

RUN_CONFIG = "run_config.yaml"

_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_moe_experts": "num_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rope_scaling": "use_rope_scaling",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Names of older versions and of Megatron-Bridge -> names of Megatron's arguments."""

_FIXED: dict[str, Any] = {
    "layernorm_zero_centered_gamma": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "apply_residual_connection_post_layernorm": False,
    "use_mup": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
}
"""Settings that change the model or the order of a weight's rows, and their value in every model of this project."""

_NOT_COMPARED = {
    "max_position_embeddings",  # no effect on a model with rotary embeddings
    "vocab_size",  # that of the tokenizer, from which the model's may differ; the shapes are checked
    "group_query_attention",  # in num_query_groups
    "disable_bias_linear",  # is add_bias_linear
    "hybrid_layer_pattern",
    "moe_router_load_balancing_type",  # of the training
    "moe_token_dispatcher_type",
    "moe_router_dtype",
}
_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of Megatron's rope scaling. Only the factor is an argument."""


def read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """Return the settings that an iteration was saved with, by the names of Megatron's arguments, and their source.

    Without readable settings the dict is empty, and the text says why.
    """
    file = directory / RUN_CONFIG
    if file.is_file():
        try:
            model = read_yaml(file, str(file))["model"]
            return settings_of_run_config(model), str(file)
        except QADError as error:
            return {}, str(error)
        except (AttributeError, KeyError, TypeError):
            return {}, f"{file}: no map 'model'."
    try:
        args = dist_checkpointing.load_common_state_dict(str(directory)).get("args")
        values = args if args is None or isinstance(args, Mapping) else vars(args)
    except (CheckpointingException, AttributeError, TypeError, ValueError, *READ_ERRORS) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {}, f"{directory}: its arguments cannot be read ({reason})."
    if values is None:
        return {}, f"{directory}: no arguments and no {RUN_CONFIG}."
    return settings_of_args(values), f"the arguments in {directory}"


def settings_of_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the arguments of Megatron-LM, by the current names."""
    settings = {_RENAMED.get(name, name): value for name, value in args.items() if value is not None}
    if settings.get("group_query_attention") is False:  # then num_query_groups has no effect
        settings["num_query_groups"] = settings.get("num_attention_heads")
    return _with_rope_constants(settings)


def settings_of_run_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the map ``model`` of Megatron-Bridge's file. Newer versions nest a part of it."""
    model = {**model, **(model.get("transformer") or {})}
    settings = {_RENAMED.get(name, name): value for name, value in model.items() if value is not None}
    if "share_embeddings_and_output_weights" in model:
        settings["untie_embeddings_and_output_weights"] = not model["share_embeddings_and_output_weights"]
    if "num_attention_heads" in model:
        settings["num_query_groups"] = model.get("num_query_groups") or model["num_attention_heads"]
    activation = model.get("activation_func")
    if isinstance(activation, dict):  # a function is saved by its name
        gated, name = bool(model.get("gated_linear_unit")), str(activation.get("_target_")).rsplit(".")[-1]
        settings |= {"swiglu": gated and name == "silu", "squared_relu": not gated and name == "squared_relu"}
    if "old_context_len" in model:  # Llama 3.1 of earlier versions, which always scale
        settings |= {"use_rope_scaling": True, "original_max_position_embeddings": model["old_context_len"]}
        return settings | {"rope_scaling_factor": model.get("scale_factor")}
    return _with_rope_constants(settings)


def _with_rope_constants(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | _ROPE_SCALING if settings.get("use_rope_scaling") else settings


def check_settings(settings: Mapping[str, Any], source: str, config: dict, *, gpt: bool) -> None:
    """Check that ``settings`` describe the model of ``config``. Settings that are not there are not compared.

    Args:
        source: where the settings come from, to start an error.
        config: Hugging Face config.
        gpt: whether the checkpoint is a ``GPTModel``.

    Raises:
        QADError: a setting contradicts the config, or is one that this project does not support.
    """
    differences = []
    for name, expected in _expected(config, gpt).items():
        if name in settings and not _equal(settings[name], expected):
            differences.append(f"{name} is {settings[name]!r}, config.json implies {expected!r}")
    if differences:
        more = f" ({len(differences)} settings differ)" if len(differences) > 3 else ""
        raise QADError(
            f"{source}: {'; '.join(differences[:3])}{more}. Give the config.json of this model with --hf-config."
        )
    for name, expected in _FIXED.items():
        if name in settings and not _equal(settings[name], expected):
            raise QADError(
                f"{source}: {name} is {settings[name]!r}, which is not supported. Expected {expected!r}: the Hugging "
                "Face model has no such setting."
            )


def _expected(config: dict, gpt: bool) -> dict[str, Any]:
    """Return what a config implies, by the names of Megatron's arguments."""
    family = family_of(config)
    options = {name.replace("-", "_"): value for name, value in family.megatron_args(config).items()}
    pattern = family.layer_pattern(config)
    expected = {_RENAMED.get(name, name): value for name, value in options.items() if name not in _NOT_COMPARED}
    expected |= {"add_bias_linear": False}
    if gpt:
        expected["num_layers"] = text_config(config).get("num_hidden_layers")
    else:
        expected["hybrid_layer_pattern"] = pattern
    if family.mlp_widths(config):  # each block has its own sizes, in an argument that holds the blocks' configs
        expected.pop("num_query_groups")
    if "-" not in pattern or family.mlp_widths(config):
        expected.pop("ffn_hidden_size")
    if expected.get("moe_router_score_function") == "sigmoid":  # then it has no effect
        expected.pop("moe_router_pre_softmax")
    scaling = family.rope_scaling(config)
    expected["use_rope_scaling"] = scaling is not None
    if scaling is not None:
        expected |= {name: scaling[name] for name in _ROPE_SCALING if name in scaling}
        expected["rope_scaling_factor"] = scaling["factor"]
    return expected


def _equal(found: Any, expected: Any) -> bool:
    if expected is None:  # not set: a factor, or a number of groups, of 1 is the same
        return found in (0, 1)
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, int | float) and isinstance(found, int | float):
        return math.isclose(found, expected)
    if isinstance(expected, str) and isinstance(found, str):
        return _pattern(found) == _pattern(expected)
    return found == expected


def _pattern(text: str) -> str:
    """Return a layer pattern without the marks of pipeline stages and without multi-token prediction layers."""
    return text.split("/")[0].replace("|", "")
