"""Configurations of tiny models that tests of several rooms read."""

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
"""A Nemotron-H of every kind of layer."""
