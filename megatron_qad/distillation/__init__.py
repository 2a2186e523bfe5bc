"""Level 2: losses between teacher and student, computed on vocab-parallel logits."""

from megatron_qad.distillation.loss_parser import parse_loss
from megatron_qad.distillation.loss_registry import LOSSES, per_token_loss
from megatron_qad.distillation.metrics import Metrics, compare
from megatron_qad.distillation.tiles import VocabShard
from megatron_qad.distillation.vocab_parallel import LogitLoss, logit_losses
from megatron_qad.distillation.weighted_losses import Term, WeightedLosses

__all__ = [
    "LOSSES",
    "LogitLoss",
    "Metrics",
    "Term",
    "VocabShard",
    "compare",
    "WeightedLosses",
    "logit_losses",
    "parse_loss",
    "per_token_loss",
]
