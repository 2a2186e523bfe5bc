"""Data options of a job in addition to Megatron's flags."""

from dataclasses import dataclass

from megatron_qad.data.images.image_settings import ImageSettings


@dataclass(frozen=True)
class DataOptions:
    """Data options as plain values, usable where Megatron is not installed."""

    calibration_samples: int
    """Number of training sequences that calibration reads ahead."""
    eval_iters: int | None = None
    """The user's ``--eval-iters``. None means that the flag was not given: an evaluation reads the whole set."""
    pad_documents_to: int = 1
    """Documents of packed rows start at multiples of this many tokens."""
    vocab_size: int | None = None
    """Number of ids of the model, without padding. None: unknown, and ids are not compared with it."""
    is_ptq: bool = False
    """Whether the job only calibrates and evaluates."""
    images: ImageSettings | None = None
    """How the model turns images into tokens; None: a model without images."""
    checkpoints: tuple[str | None, ...] = ()
    """Model directories that are searched for the tokenizer that the data must have been made with."""
