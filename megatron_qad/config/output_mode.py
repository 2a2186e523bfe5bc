"""Which outputs a job keeps of each microbatch: logits or hidden states, of the student and of the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import LogitLoss, WeightedLosses
from megatron_qad.distillation.fused_linear import makes_gradient_in_forward, tokens_per_chunk
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS

# Logits of one microbatch, of both models, above which output layer and loss are fused under "auto". A GPU that holds
# two models has a gigabyte to spare; less would not fill a chunk.
FUSED_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class OutputMode:
    """What the last stage of each model returns."""

    fused: bool = False
    """The student returns hidden states, and no logits of either model exist but in chunks."""
    teacher_hidden: bool = False
    """The teacher's pass keeps its hidden states instead of logits."""

    def describe(self) -> str:
        """For the log and the plan."""
        student = "fused with the loss" if self.fused else "makes logits"
        return (
            f"output layer {student}; the teacher's pass keeps {'hidden states' if self.teacher_hidden else 'logits'}"
        )


@dataclass(frozen=True)
class OutputSizes:
    """What the size of a microbatch's outputs on a rank depends on."""

    tokens: int
    """Of a microbatch, on a context-parallel rank."""
    columns: int
    """V/tp, padding included."""
    element_bytes: int
    """2 for BF16."""
    sequence_shards: int = 1
    """Ranks that share out hidden states: the tensor-parallel size under sequence parallelism."""

    @classmethod
    def from_flags(cls, flags: MegatronFlags, vocab_size: int) -> "OutputSizes":
        """Of a job's flags and its model's vocabulary, which Megatron pads."""
        tp = flags.tensor_model_parallel_size
        multiple = flags.make_vocab_size_divisible_by * tp
        return cls(
            tokens=flags.micro_batch_size * flags.seq_length // flags.context_parallel_size,
            columns=-(-vocab_size // multiple) * multiple // tp,
            element_bytes=2 if flags.bf16 else 4,
            sequence_shards=tp if flags.sequence_parallel else 1,
        )

    def logits(self) -> int:
        """Bytes of one microbatch's logits of one model."""
        return self.tokens * self.columns * self.element_bytes

    def hidden(self, hidden_size: int) -> int:
        """Bytes of one microbatch's final hidden states."""
        return self.tokens * hidden_size // self.sequence_shards * self.element_bytes

    def fused(self, num_losses: int, hidden_size: int) -> dict[str, int]:
        """Bytes on a GPU of a fused output layer: "chunk", the logits of both models that exist at a time, and
        "gradient", the output weight's where the forward pass makes it. Plans are made where no GPU is.

        Args:
            num_losses: of logits. hidden_size: the student's.
        """
        chunk = min(tokens_per_chunk(self.columns, self.element_bytes, "cuda"), self.tokens)
        in_forward = makes_gradient_in_forward(num_losses, self.tokens, hidden_size, self.element_bytes)
        return {
            "chunk": 2 * chunk * self.columns * self.element_bytes,
            "gradient": 4 * self.columns * hidden_size if in_forward else 0,
        }


def resolve_output_mode(
    options: QADOptions, sizes: OutputSizes, losses: WeightedLosses, teacher_hidden_size: int | None
) -> OutputMode:
    """The outputs of a job.

    Args:
        teacher_hidden_size: None where there is no teacher.

    Raises:
        QADError: a choice that the loss or the other choice contradicts.
    """
    wanted, keeps = options.qad_fused_linear_loss, options.qad_teacher_output
    two_rounds = [term.name for term in losses.terms_of_type(LogitLoss) if term.loss.rounds > 1]
    if wanted == "always" and two_rounds:
        raise QADError(
            f"--qad-fused-linear-loss always: {two_rounds[0]} reads all logits twice and cannot be fused with "
            "the output layer. Leave the flag out, or train with another loss."
        )
    if wanted == "always" and keeps == "logits":
        raise QADError("--qad-teacher-output logits: --qad-fused-linear-loss always needs the teacher's hidden states")
    logits, hidden = sizes.logits(), sizes.hidden(teacher_hidden_size or 0)
    is_large = logits * (1 if teacher_hidden_size is None else 2) > FUSED_ABOVE_BYTES
    fused = wanted == "always" or wanted == "auto" and is_large and not two_rounds and keeps != "logits"
    keeps_hidden = keeps == "hidden" or keeps == "auto" and (fused or hidden < logits)
    return OutputMode(fused, teacher_hidden_size is not None and keeps_hidden)


def check_head(outputs: OutputMode, formats: Mapping[str, str]) -> None:
    """Refuse a head whose weight is quantized in its own forward pass where that pass is not run.

    Args:
        formats: of the student's linears, by Megatron weight name.
    """
    head = FORMATS[formats.get("output_layer.weight", "bf16")]
    if outputs.fused and head.weight_in_forward is not None:
        raise QADError(
            "an INT4 head is quantized in its forward pass, which an output layer that is fused with the loss does not "
            "run: give --qad-fused-linear-loss never"
        )
