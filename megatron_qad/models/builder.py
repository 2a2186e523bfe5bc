"""Building models: Megatron's ``HybridModelConfig`` extended with llama3 rope scaling."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_qad.models.rope import llama3_inv_freq


@dataclass(kw_only=True)
class QADModelConfig(HybridModelConfig):
    """``HybridModelConfig`` with llama3 rope scaling, for which Megatron has no field."""

    builder: ClassVar[str] = "megatron_qad.models.builder.QADModelBuilder"
    rope_scaling: dict | None = None
    """Parameters of llama3 rope scaling, from ``Family.rope_scaling``. None means plain rope."""


class QADModelBuilder(HybridModelBuilder):
    """Builds a ``HybridModel`` stage and sets the scaled frequencies of its rotary embedding."""

    def build_model(self, *args, **kwargs):
        model = super().build_model(*args, **kwargs)
        config = self._model_config
        if config.rope_scaling is not None:
            rotary = model.rotary_pos_emb
            rotary.inv_freq = llama3_inv_freq(
                dim=config.transformer.kv_channels, base=config.rotary_base, scaling=config.rope_scaling
            ).to(rotary.inv_freq.device)
        return model


def build_chunks(config: QADModelConfig) -> list[torch.nn.Module]:
    """Build this rank's model chunks, one per virtual pipeline stage, without wrapping them in DDP."""
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Put a model into evaluation mode without gradients, as a teacher needs it. Returns the model."""
    return model.eval().requires_grad_(False)
