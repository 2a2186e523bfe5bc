"""The losses by name, on one interface: logits of both models in, one number a token out."""

from dataclasses import dataclass

from torch import Tensor

from megatron_qad.distillation import vocab_parallel

LOSSES = ("kl", "ce")
"""kl: KL(teacher || student), what QAD trains with. ce: cross entropy against the labels, which is QAT; needs no
teacher."""


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary the logits of this rank cover."""

    first_column: int
    """Token id of the first column."""
    num_columns: int
    """Columns that are real tokens; those after them are padding."""
    group: object = None
    """Tensor-parallel process group."""

    @classmethod
    def of_rank(cls, width: int, vocab_size: int, group=None) -> "VocabShard":
        """The shard of this rank, whose logits are ``width`` wide, in a vocabulary of ``vocab_size`` unpadded."""
        first = width * (group.rank() if group is not None else 0)
        return cls(first, min(max(vocab_size - first, 0), width), group)


def per_token_loss(
    name: str, student: Tensor, teacher: Tensor | None, labels: Tensor, shard: VocabShard, *, temperature: float = 1.0
) -> Tensor:
    """The loss of each token, float32, in nats.

    Args:
        name: one of ``LOSSES``. student, teacher: logits [..., V/tp]; the backward pass consumes the student's.
        ``teacher`` may be None for "ce". labels: int64 [...]. temperature: of both distributions; used by "kl".
    """
    if name == "kl":
        return vocab_parallel.kl_divergence(
            student, teacher, shard.group, num_columns=shard.num_columns, temperature=temperature
        )
    if name == "ce":
        return vocab_parallel.cross_entropy(
            student, labels, shard.group, num_columns=shard.num_columns, first_column=shard.first_column
        )
    raise ValueError(f"unknown loss {name!r}; one of {LOSSES}")
