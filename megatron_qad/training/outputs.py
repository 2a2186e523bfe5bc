"""Which outputs a job keeps, logits or hidden states, and the losses and metrics of either."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.config.options import QADOptions
from megatron_qad.distillation import LogitLoss, Metrics, VocabShard, WeightedLosses, compare, logit_losses
from megatron_qad.distillation.fused_linear import (
    fused_linear_losses,
    makes_gradient_in_forward,
    tokens_of_chunk,
)
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.registry import FORMATS
from megatron_qad.models.output_layer import Output

# Logits of one microbatch, of both models, above which output layer and loss are fused under "auto". A GPU that holds
# two models has a gigabyte to spare; less would not fill a chunk.
FUSED_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Outputs:
    """What the last stage of each model returns."""

    fused: bool = False
    """The student returns hidden states, and no logits of either model exist but in chunks."""
    teacher_hidden: bool = False
    """The teacher's pass keeps its hidden states instead of logits."""

    @classmethod
    def chosen(cls, options: QADOptions) -> "Outputs":
        """Of a job whose options are settled (``settle_outputs``)."""
        return cls(options.qad_output_layer == "fused", options.qad_teacher_output == "hidden")

    def describe(self) -> str:
        """For the log and the plan."""
        student = "fused with the loss" if self.fused else "makes logits"
        return (
            f"output layer {student}; the teacher's pass keeps {'hidden states' if self.teacher_hidden else 'logits'}"
        )


def output_bytes(args: argparse.Namespace, teacher_hidden_size: int | None) -> dict[str, int]:
    """Bytes on a rank of one microbatch's "logits" of one model, and of the teacher's "hidden" states."""
    tokens, width, element = _logits_of(args)
    shards = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return {"logits": tokens * width * element, "hidden": tokens * (teacher_hidden_size or 0) // shards * element}


def _logits_of(args: argparse.Namespace) -> tuple[int, int, int]:
    """One microbatch's on a rank: tokens, V/tp, bytes of an element."""
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    return tokens, args.padded_vocab_size // args.tensor_model_parallel_size, 2 if args.bf16 else 4


def fused_bytes(args: argparse.Namespace, num_losses: int, hidden_size: int) -> dict[str, int]:
    """Bytes on a GPU of a fused output layer: "chunk", the logits of both models that exist at a time, and "gradient",
    the output weight's where the forward pass makes it. Plans are made where no GPU is.

    Args:
        num_losses: of logits. hidden_size: the student's.
    """
    tokens, width, element = _logits_of(args)
    chunk = min(tokens_of_chunk(width, element, "cuda"), tokens)
    in_forward = makes_gradient_in_forward(num_losses, tokens, hidden_size, element)
    return {"chunk": 2 * chunk * width * element, "gradient": 4 * width * hidden_size if in_forward else 0}


def choose_outputs(args: argparse.Namespace, losses: WeightedLosses, teacher_hidden_size: int | None) -> Outputs:
    """The outputs of a job.

    Args:
        args: parsed and validated, with ``args.qad``.
        teacher_hidden_size: None where there is no teacher.

    Raises:
        QADError: a choice that the loss or the other choice contradicts.
    """
    layer, keeps = args.qad.qad_output_layer, args.qad.qad_teacher_output
    two_rounds = [term.name for term in losses.of_kind(LogitLoss) if term.loss.rounds > 1]
    if layer == "fused" and two_rounds:
        raise QADError(
            f"--qad-output-layer fused: {two_rounds[0]} reads all logits twice and cannot be fused with the output "
            "layer; leave the flag out or train with another loss"
        )
    if layer == "fused" and keeps == "logits":
        raise QADError("--qad-teacher-output logits: --qad-output-layer fused needs the teacher's hidden states")
    size = output_bytes(args, teacher_hidden_size)
    is_large = size["logits"] * (1 if teacher_hidden_size is None else 2) > FUSED_ABOVE_BYTES
    fused = layer == "fused" or layer == "auto" and is_large and not two_rounds and keeps != "logits"
    hidden = keeps == "hidden" or keeps == "auto" and (fused or size["hidden"] < size["logits"])
    return Outputs(fused, teacher_hidden_size is not None and hidden)


def settle_outputs(args: argparse.Namespace, losses: WeightedLosses, teacher_hidden_size: int | None) -> None:
    """Put what "auto" means for this job into ``args.qad``, which is plain data: Megatron stores it in checkpoints."""
    outputs = choose_outputs(args, losses, teacher_hidden_size)
    args.qad.qad_output_layer = "fused" if outputs.fused else "separate"
    args.qad.qad_teacher_output = "hidden" if outputs.teacher_hidden else "logits"


def check_head(outputs: Outputs, formats: Mapping[str, str]) -> None:
    """Refuse a head whose weight is quantized in its own forward pass where that pass is not run.

    Args:
        formats: of the student's linears, by Megatron weight name.
    """
    head = FORMATS[formats.get("output_layer.weight", "bf16")]
    if outputs.fused and head.weight_in_forward is not None:
        raise QADError(
            "an INT4 head is quantized in its forward pass, which an output layer that is fused with the loss does not "
            "run: give --qad-output-layer separate"
        )


def losses_of(
    losses, student: Output, teacher: Output | None, labels: Tensor, shard: VocabShard, weight: Tensor
) -> tuple[Tensor, ...]:
    """``logit_losses`` of two outputs, fused with the output layers if the student's are hidden states."""
    if student.model is None:
        of_teacher = None if teacher is None else teacher.logits()
        return logit_losses(losses, student.tensor, of_teacher, labels, shard, weight=weight)
    return fused_linear_losses(
        losses,
        student.hidden(),
        student.weight,
        *((None, None) if teacher is None else (teacher.hidden(), teacher.weight)),
        labels,
        shard,
        token_weight=weight,
        reduce_hidden_grad=not student.sums_hidden_grad,
    )


@torch.no_grad()
def metrics_of(student: Output, teacher: Output | None, labels: Tensor, weight: Tensor, shard: VocabShard) -> Metrics:
    """``compare`` of two outputs; in chunks of tokens if the student's are hidden states."""
    if student.model is None:
        return compare(student.tensor, None if teacher is None else teacher.logits(), labels, weight, shard)
    total = Metrics.zero(weight.device)
    hidden = student.hidden().flatten(0, 1)
    of_teacher = None if teacher is None else teacher.hidden().flatten(0, 1)
    labels, weight = labels.flatten(), weight.flatten()
    step = tokens_of_chunk(len(student.weight), student.weight.element_size(), weight.device.type)
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        logits = None if of_teacher is None else of_teacher[rows] @ teacher.weight.t()
        total += compare(hidden[rows] @ student.weight.t(), logits, labels[rows], weight[rows], shard)
    return total
