"""Settings that a checkpoint was trained with: those of Megatron-LM and of Megatron-Bridge, and contradictions."""

import pytest
from gpt_checkpoint import ARGS, BRIDGE, CONFIG
from tiny_configs import TINY_HYBRID

from megatron_qad.engine import QADError, init_runtime

init_runtime()  # before megatron

from megatron_qad.checkpoint.megatron_settings import (  # noqa: E402
    check_settings,
    settings_of_args,
    settings_of_run_config,
)


def check(settings: dict, **config) -> str:
    """Return the message with which settings are refused."""
    with pytest.raises(QADError) as error:
        check_settings(settings, "source", CONFIG | config, gpt=True)
    return str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotary_base": 10000}, "rotary_base is 10000, config.json implies 500000"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon is 1e-06, config.json implies 1e-05"),
        # the name of the argument in older versions
        ({"layernorm_epsilon": None, "norm_epsilon": 1e-6}, "layernorm_epsilon is 1e-06"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8, config.json implies 4"),
        ({"group_query_attention": False}, "num_query_groups is 4, config.json implies 2"),
        ({"num_layers": 4, "hidden_size": 8}, "hidden_size is 8, config.json implies 16; num_layers is 4, "),
        ({"use_rope_scaling": True}, "use_rope_scaling is True, config.json implies False"),
        ({"swiglu": False}, "swiglu is False, config.json implies True"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm', config.json implies 'RMSNorm'"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5, which is not supported. Expected 1.0"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True, which is not supported"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma is True, which is not supported"),
        ({"window_size": (128, 0)}, "window_size is (128, 0), which is not supported"),
    ],
)
def test_arguments_that_contradict_the_config(change, message):
    assert message in check(settings_of_args(ARGS | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotary_base": 10000.0}, "rotary_base is 10000.0, config.json implies 500000"),
        ({"share_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights is False"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "swiglu is False"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma is True, which is not supported"),
        ({"transformer": {"num_query_groups": 4}}, "num_query_groups is 4"),
        ({"old_context_len": 8192, "scale_factor": 8.0}, "use_rope_scaling is True, config.json implies False"),
    ],
)
def test_run_config_that_contradicts_the_config(change, message):
    assert message in check(settings_of_run_config(BRIDGE | change))


def test_constants_of_rope_scaling():
    """Megatron has one original length, 8192. A config with another one is another model."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings = settings_of_args(ARGS | {"use_rope_scaling": True, "rope_scaling_factor": 8.0})
    text = check(settings, rope_scaling=scaling | {"original_max_position_embeddings": 4096})
    assert "original_max_position_embeddings is 8192, config.json implies 4096" in text
    original = scaling | {"original_max_position_embeddings": 8192}
    assert "rope_scaling_factor is 8.0, config.json implies 32.0" in check(
        settings, rope_scaling=original | {"factor": 32.0}
    )
    check_settings(settings, "source", CONFIG | {"rope_scaling": original}, gpt=True)


def test_layer_pattern_and_neutral_router_settings():
    """Pipeline marks and prediction layers are not part of a pattern; one group, or no groups, is the same."""
    settings = {"hybrid_layer_pattern": "ME|*-M/*E", "moe_router_num_groups": 1, "moe_router_group_topk": 1}
    config = TINY_HYBRID | {"num_experts_per_tok": 2}
    check_settings(settings, "source", config, gpt=False)
    with pytest.raises(QADError, match="hybrid_layer_pattern is 'MM', config.json implies 'ME\\*-M'"):
        check_settings({"hybrid_layer_pattern": "MM"}, "source", config, gpt=False)
