"""How a model is built: Megatron's ``HybridModelConfig`` with what a Hugging Face config adds to it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_qad.models.rope import llama3_inv_freq


@dataclass(kw_only=True)
class QADModelConfig(HybridModelConfig):
    """A ``HybridModelConfig`` with llama3 rope scaling, which upstream's has no field for."""

    builder: ClassVar[str] = "megatron_qad.models.builder.QADModelBuilder"
    rope_scaling: dict | None = None
    """The ``rope_scaling`` entry of the Hugging Face config where its type is "llama3"; None: plain rope."""


class QADModelBuilder(HybridModelBuilder):
    """Builds a ``HybridModel`` stage and gives its rotary embedding the scaled frequencies."""

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
    """This rank's chunks of a model in the job's parallel layout, one a virtual stage, without DDP's wrapper."""
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Evaluation mode, no gradients: what a teacher is."""
    return model.eval().requires_grad_(False)
