"""The CPU backend, which runs Megatron on machines without a GPU."""
