"""Floor 2: the losses between teacher and student, over logits whose vocabulary is sharded across tensor-parallel
ranks."""

from megatron_qad.distillation.losses import LOSSES, per_token_loss
from megatron_qad.distillation.metrics import Metrics, compare

__all__ = ["LOSSES", "Metrics", "compare", "per_token_loss"]
