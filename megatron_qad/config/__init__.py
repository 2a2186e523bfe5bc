"""Floor 1: QAD's options as a dataclass, its flags, and YAML files that hold any Megatron or QAD option."""
