"""The student or the teacher of a job: its checkpoint and what the checkpoint's config determines."""

from dataclasses import dataclass

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.parallelism import split_into_stages
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.families.base import Family


@dataclass(frozen=True)
class ModelConfig:
    """Checkpoint directory and Hugging Face config of the student or the teacher."""

    checkpoint: str
    """Checkpoint directory, written by megatron-qad import or by a run."""
    hf: dict
    """Content of ``hf/config.json`` in the checkpoint directory."""

    @property
    def family(self) -> Family:
        return family_of(self.hf)

    @property
    def num_layers(self) -> int:
        """Length of the layer pattern: each attention, MLP, expert and Mamba layer counts as one."""
        return len(self.family.layer_pattern(self.hf))

    @property
    def num_blocks(self) -> dict[int, str]:
        """Numbers of layers as Megatron counts them and as the config does, with what they count."""
        counted = {text_config(self.hf).get("num_hidden_layers"): "blocks of the config"}
        return {self.num_layers: "layers of the pattern"} | {n: what for n, what in counted.items() if n}

    @property
    def hidden_size(self) -> int:
        return text_config(self.hf)["hidden_size"]

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest sequence."""
        return self.family.megatron_args(self.hf)["max-position-embeddings"]

    @property
    def vocab_size(self) -> int:
        """Vocabulary size without padding."""
        return text_config(self.hf)["vocab_size"]

    def shape(self, flags: MegatronFlags, virtual_stages: int) -> dict:
        """Return Megatron's options for the model, with the layer pattern split into pipeline stages."""
        shape = self.family.megatron_args(self.hf)
        num_stages = flags.pipeline_model_parallel_size * virtual_stages
        shape["hybrid-layer-pattern"] = split_into_stages(shape["hybrid-layer-pattern"], num_stages)
        return shape
