"""Configs of tiny models, shared by the tests of several packages."""

TINY_HYBRID = {
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "ME*-M",
    "num_hidden_layers": 5,
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 80,
}
"""A Nemotron-H with every kind of layer."""

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
}
NARROW_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
_NO_MLP = {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}}
_BLOCKS = [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.625}}, _NO_MLP]
_RADIO = {"num_hidden_layers": 2, "intermediate_size": 48, "max_resolution": 64}
TINY_OF_FAMILY = {
    "llama": TINY_LLAMA,
    "qwen2": TINY_LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": TINY_LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": TINY_LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | _EXPERTS,
    "nemotron_h": TINY_HYBRID | {"model_type": "nemotron_h"},
    "decilm": TINY_LLAMA
    | {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
    | {"num_hidden_layers": 2, "block_configs": _BLOCKS},
    "nemotron_vl": {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "model_type": "NemotronH_Nano_VL_V2",
        "llm_config": TINY_HYBRID | {"model_type": "nemotron_h"},
        "vit_hidden_size": 32,
        "projector_hidden_size": 64,
        "vision_config": _RADIO,
    },
    "llama_nemotron_vl": {
        "architectures": ["Llama_Nemotron_Nano_VL"],
        "model_type": "Llama_Nemotron_Nano_VL",
        "llm_config": TINY_LLAMA,
        "vit_hidden_size": 32,
        "projector_hidden_size": 64,
        "vision_config": _RADIO,
    },
}
"""One config per family, by the file name of the family."""
