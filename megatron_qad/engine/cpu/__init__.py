"""The CPU backend: Megatron on machines without a GPU."""
