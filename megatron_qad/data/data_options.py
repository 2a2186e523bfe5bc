"""What a job asks of its data beside Megatron's flags."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    """Plain values: a configuration can be made where Megatron is not installed."""

    calibration_samples: int
    """Sequences that calibration reads ahead."""
    eval_iters: int | None = None
    """As the user gave them; None: not at all, and an evaluation reads the whole set."""
    pad_documents_to: int = 1
    """Documents of packed rows start at multiples of so many tokens."""
    checkpoints: tuple[str | None, ...] = ()
    """Directories of the models, one of which may hold the tokenizer that the data was made with."""
