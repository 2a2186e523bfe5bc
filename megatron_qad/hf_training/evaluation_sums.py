"""Sums of the metrics of an evaluation with transformers, row by row."""

import torch
from torch import Tensor

from megatron_qad.distillation import Metrics, VocabShard, compare
from megatron_qad.distillation.metrics import NAMES
from megatron_qad.hf_training.training_rows import NO_LOSS


class EvaluationSums:
    """The metrics of ``distillation.metrics``, summed over the rows that it is given.

    Sums are kept by row until they are added, because a process may hold copies of rows that fill its last batch.
    """

    def __init__(self):
        self._total = torch.zeros(len(NAMES) + 1, dtype=torch.float64)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the sums over the tokens of each row in the order of ``NAMES``, then the number of its tokens.

        Args:
            student, teacher: logits [rows, length, V].
            labels: int64 [rows, length], the label of each position; -100 does not count.

        Returns:
            float64 [rows, len(NAMES) + 1].
        """
        shard, rows = VocabShard(0, student.shape[-1]), []
        for row in range(len(labels)):
            counts = (labels[row] != NO_LOSS).float()
            metrics: Metrics = compare(student[row], teacher[row], labels[row], counts, shard)
            rows.append(torch.cat((metrics.sums, metrics.num_tokens.view(1))))
        return torch.stack(rows)

    def add(self, rows: Tensor) -> None:
        """Add rows of all processes, float64 [rows, len(NAMES) + 1]."""
        self._total += rows.sum(0).cpu()

    def means(self) -> dict[str, float]:
        """Return the means per token by name, and "num_tokens". Means are NaN if there is no token."""
        return Metrics(self._total[:-1], self._total[-1]).means()
