"""Names and shapes of Megatron's checkpoints: where each tensor is found, and what is refused by name."""

import pytest
import torch
from gpt_checkpoint import CONFIG, FC1, GPT, HEAD, QKV

from megatron_qad.engine import QADError, init_runtime

init_runtime()  # before megatron

from megatron_qad.checkpoint.megatron_names import locate  # noqa: E402
from megatron_qad.checkpoint.slice_reader import Slice, Stored  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402


def stored(**changes: tuple | Stored | None) -> dict[str, Stored]:
    """Return the tensors of ``GPT``, with others instead of or next to them; None removes one."""
    shapes = {name: shape for name, shape in (GPT | changes).items() if shape is not None}
    return {name: x if isinstance(x, Stored) else Stored(x, torch.bfloat16) for name, x in shapes.items()}


def error_of(changes: dict, **config) -> str:
    """Return the message with which the names and shapes of a checkpoint are refused."""
    config = CONFIG | config
    with pytest.raises(QADError) as error:
        locate(family_of(config).tensors(config), stored(**changes), "checkpoint")
    return str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({QKV: None}, "it lacks 3 tensors of the model in config.json, first 'decoder.layers.0.self_attention."),
        (
            {"decoder.layers.mlp.linear_fc2.bias": (3, 16)},
            "it has 1 tensor that the model lacks, first 'decoder.layers.mlp.linear_fc2",
        ),
        ({QKV: (3, 48, 16)}, f"{QKV} has shape [3, 48, 16], but config.json implies [3, 32, 16]"),
        ({QKV: (2, 32, 16)}, f"{QKV} has shape [2, 32, 16], but config.json implies [3, 32, 16]"),
        ({FC1: Stored((3, 48, 16), torch.uint8)}, f"{FC1} has dtype uint8, expected bfloat16"),
        ({HEAD: (39, 16)}, f"{HEAD} has 39 rows, but config.json has vocab_size 40"),
        ({HEAD: (9000, 16)}, f"{HEAD} has 9000 rows, but config.json has vocab_size 40"),
        ({HEAD: None}, "The head is tied to the embedding: config.json must have tie_word_embeddings true"),
        ({"decoder.final_layernorm.weight": None}, "found neither"),
        ({"decoder.final_norm.weight": (16,)}, "found both"),
    ],
)
def test_wrong_tensors_are_refused_by_name(changes, message):
    assert message in error_of(changes)


def test_untied_checkpoint_of_a_tied_config():
    text = error_of({}, tie_word_embeddings=True)
    assert f"first {HEAD!r}" in text and "must have tie_word_embeddings false" in text


def test_config_with_fewer_blocks_than_a_stacked_checkpoint():
    """The attention of the second block would be lost."""
    blocks = [{"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 24}} for _ in range(3)]
    blocks[1] = {"attention": {"no_op": True}, "ffn": {"intermediate_size": 24}}
    text = error_of({}, architectures=["DeciLMForCausalLM"], model_type="nemotron-nas", block_configs=blocks)
    assert "layer_norm_weight has shape [3, 16], but the model in config.json has only 2 of its 3 parts" in text


def test_names_of_transformer_engine():
    """With Transformer Engine an expert layer has a norm of its own, and grouped experts are one tensor."""
    config = CONFIG | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config |= {"num_experts": 4, "moe_intermediate_size": 8}
    maps = family_of(config | {"num_experts_per_tok": 2}).tensors(config)
    shapes = {name: shape for name, shape in GPT.items() if ".mlp." not in name}
    shapes |= {f"decoder.layers.self_attention.{x}_layernorm.weight": (3, 4) for x in "qk"}
    shapes |= {"decoder.layers.pre_mlp_layernorm.weight": (3, 16), "decoder.layers.mlp.router.weight": (3, 4, 16)}
    shapes |= {
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (3, 4, 16, 16),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (3, 4, 16, 8),
    }
    pieces = locate(maps, {name: Stored(shape, torch.bfloat16) for name, shape in shapes.items()}, "checkpoint")
    (fc2,) = pieces["decoder.layers.5.mlp.experts.experts.3.linear_fc2.weight"]
    assert (fc2.name, fc2.index) == ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (2, 3))
    assert fc2.slice == Slice(fc2.name, (2, 3, 0, 0), (1, 1, 16, 8))
    (norm,) = pieces["decoder.layers.1.pre_mlp_layernorm.weight"]
    assert (norm.name, norm.index) == ("decoder.layers.pre_mlp_layernorm.weight", (0,))
