"""Expected tensors of a dense decoder, shared by Llama and similar families."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, is_set, num_layers, positive_integer


def dense_decoder(config: dict[str, Any], *, qkv_bias: bool, o_bias: bool, mlp_bias: bool, qk_norm: bool) -> Inventory:
    """Return the inventory of a dense decoder: pre-norm, grouped-query attention, gated MLP."""
    hidden, heads = positive_integer(config, "hidden_size"), positive_integer(config, "num_attention_heads")
    kv_heads = positive_integer(config, "num_key_value_heads", heads)
    head_dim = positive_integer(config, "head_dim", hidden // heads)
    ffn, vocab = positive_integer(config, "intermediate_size"), positive_integer(config, "vocab_size")
    model = Inventory(tied_head=is_set(config, "tie_word_embeddings"))
    model.tensors[model.embedding] = (vocab, hidden)
    model.tensors["model.norm.weight"] = (hidden,)
    model.linears[model.head] = (vocab, hidden)

    def linear(name: str, rows: int, columns: int, bias: bool) -> str:
        model.linears[name] = (rows, columns)
        if bias:
            model.tensors[f"{name}.bias"] = (rows,)
        return name

    for index in range(num_layers(config)):
        layer = f"model.layers.{index}"
        model.tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        model.tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        if qk_norm:
            model.tensors[f"{attention}.q_norm.weight"] = (head_dim,)
            model.tensors[f"{attention}.k_norm.weight"] = (head_dim,)
        qkv = (
            linear(f"{attention}.q_proj", heads * head_dim, hidden, qkv_bias),
            linear(f"{attention}.k_proj", kv_heads * head_dim, hidden, qkv_bias),
            linear(f"{attention}.v_proj", kv_heads * head_dim, hidden, qkv_bias),
        )
        linear(f"{attention}.o_proj", hidden, heads * head_dim, o_bias)
        gate_up = (
            linear(f"{mlp}.gate_proj", ffn, hidden, mlp_bias),
            linear(f"{mlp}.up_proj", ffn, hidden, mlp_bias),
        )
        linear(f"{mlp}.down_proj", hidden, ffn, mlp_bias)
        model.fused += [qkv, gate_up]
        model.attentions.append((qkv[1], qkv[2]))
    return model
