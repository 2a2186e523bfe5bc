"""Floor 2: the losses between teacher and student, over logits whose vocabulary is sharded across tensor-parallel
ranks."""

from megatron_qad.distillation.losses import LOSSES, per_token_loss
from megatron_qad.distillation.metrics import Metrics, compare
from megatron_qad.distillation.spec import WeightedLosses, parse_loss
from megatron_qad.distillation.vocab_parallel import VocabShard, logit_losses

__all__ = [
    "LOSSES",
    "Metrics",
    "VocabShard",
    "compare",
    "WeightedLosses",
    "logit_losses",
    "parse_loss",
    "per_token_loss",
]
