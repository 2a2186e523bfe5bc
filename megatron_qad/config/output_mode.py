"""Chooses whether student and teacher return logits or final hidden states for each microbatch."""

from dataclasses import dataclass

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import LogitLoss, WeightedLosses
from megatron_qad.distillation.fused_linear import makes_gradient_in_forward, tokens_per_chunk
from megatron_qad.engine.errors import QADError

# "auto" fuses the output layer and the loss if the logits of one microbatch of both models are larger than this. A GPU
# that holds two models has a gigabyte to spare; fewer logits would not fill a chunk.
FUSED_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class OutputMode:
    """What the last pipeline stage of each model returns."""

    fused: bool = False
    """Whether the student returns hidden states, and logits of both models exist only in chunks."""
    teacher_hidden: bool = False
    """Whether the teacher's pass stores final hidden states instead of logits."""

    def describe(self) -> str:
        """Return a description for the log and the plan."""
        student = "fused with the loss" if self.fused else "makes logits"
        return (
            f"output layer {student}; the teacher's pass keeps {'hidden states' if self.teacher_hidden else 'logits'}"
        )


@dataclass(frozen=True)
class OutputSizes:
    """The sizes that determine how many bytes the outputs of a microbatch take on a rank."""

    tokens: int
    """Number of tokens of a microbatch on a context-parallel rank."""
    columns: int
    """Number of vocabulary columns on a tensor-parallel rank: V/tp, padding included."""
    element_bytes: int
    """Bytes per element: 2 for BF16."""
    sequence_shards: int = 1
    """Number of ranks that split the hidden states: the tensor-parallel size under sequence parallelism."""

    @classmethod
    def from_flags(cls, flags: MegatronFlags, vocab_size: int) -> "OutputSizes":
        """Compute the sizes from a job's flags and its vocabulary size, which Megatron pads."""
        tp = flags.tensor_model_parallel_size
        multiple = flags.make_vocab_size_divisible_by * tp
        return cls(
            tokens=flags.micro_batch_size * flags.seq_length // flags.context_parallel_size,
            columns=-(-vocab_size // multiple) * multiple // tp,
            element_bytes=2 if flags.bf16 else 4,
            sequence_shards=tp if flags.sequence_parallel else 1,
        )

    def logits(self) -> int:
        """Return the bytes of one model's logits for one microbatch."""
        return self.tokens * self.columns * self.element_bytes

    def hidden(self, hidden_size: int) -> int:
        """Return the bytes of the final hidden states of one microbatch."""
        return self.tokens * hidden_size // self.sequence_shards * self.element_bytes

    def fused(self, num_losses: int, hidden_size: int) -> dict[str, int]:
        """Return the bytes of a fused output layer on a GPU, also when called without one (for a plan).

        Args:
            num_losses: number of losses of logits.
            hidden_size: hidden size of the student.

        Returns:
            "chunk": logits of both models that exist at a time. "gradient": float32 gradient of the output weight, if
            the forward pass computes it, otherwise 0.
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
    """Return the output mode of a job.

    Args:
        teacher_hidden_size: None if there is no teacher.

    Raises:
        QADError: ``--qad-fused-linear-loss`` contradicts the loss or ``--qad-teacher-output``.
    """
    fuse, teacher_output = options.qad_fused_linear_loss, options.qad_teacher_output
    two_rounds = [term.name for term in losses.terms_of_type(LogitLoss) if term.loss.rounds > 1]
    if fuse == "always" and two_rounds:
        raise QADError(
            f"--qad-fused-linear-loss always: {two_rounds[0]} reads all logits twice and cannot be fused with "
            "the output layer. Leave the flag out, or train with another loss."
        )
    if fuse == "always" and teacher_output == "logits":
        raise QADError(
            "--qad-teacher-output logits: --qad-fused-linear-loss always needs the teacher's hidden states. Leave one "
            "of the two flags out."
        )
    logits, hidden = sizes.logits(), sizes.hidden(teacher_hidden_size or 0)
    is_large = logits * (1 if teacher_hidden_size is None else 2) > FUSED_ABOVE_BYTES
    fused = fuse == "always" or fuse == "auto" and is_large and not two_rounds and teacher_output != "logits"
    stores_hidden = teacher_output == "hidden" or teacher_output == "auto" and (fused or hidden < logits)
    return OutputMode(fused, teacher_hidden_size is not None and stores_hidden)
