"""A tiny Llama: its config.json, its tensors in a checkpoint of Megatron-LM, and what is saved next to them."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
HEAD = "output_layer.weight"
# A GPTModel of that config as Megatron-LM saves it, with a vocabulary padded to 48 rows.
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"
GPT = {
    "embedding.word_embeddings.weight": (48, 16),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 16),
    QKV: (3, 32, 16),
    "decoder.layers.self_attention.linear_proj.weight": (3, 16, 16),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 16),
    FC1: (3, 48, 16),
    "decoder.layers.mlp.linear_fc2.weight": (3, 16, 24),
    "decoder.final_layernorm.weight": (16,),
    HEAD: (48, 16),
}
ARGS = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "use_rope_scaling": False,
}
# What Megatron-Bridge writes for the same model.
BRIDGE = {
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500000.0,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "share_embeddings_and_output_weights": False,
    "layernorm_zero_centered_gamma": False,
    "rope_scaling": False,
}
