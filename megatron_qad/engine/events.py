"""The events of a job, and the base class of the callbacks that subscribe to them.

``engine.loop`` reports the events of Megatron's loop, ``training.job`` those that QAD adds. A callback is a class that
overrides some of the events. Every rank runs the same callbacks in the same order, so a callback may call collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Update:
    """A pending optimizer update, which callbacks may skip. The numbers are the same on every rank."""

    step: int
    """Number of the training step, counted from 1."""
    model: Sequence[torch.nn.Module]
    """The student's wrapped chunks, with this step's gradients."""
    loss: float
    """Mean loss over all tokens that count."""
    num_tokens: float
    """Number of tokens that count in the loss, summed over all ranks that compute a loss."""
    is_finite: bool
    """Whether all losses and gradients are finite."""
    optimizer: Any = None
    """Megatron's optimizer, which reads the gradients next."""
    is_left_out: bool = False
    """Whether the update is skipped: weights, optimizer and learning rate do not change, but the data is consumed."""


@dataclass(frozen=True)
class TrainedStep:
    """A completed training step."""

    number: int
    """Number of the step, counted from 1."""
    losses: dict[str, torch.Tensor]
    """Mean of each reported loss over all tokens that count, on the last pipeline stage."""
    grad_norm: float | None
    """Norm of the gradients. None means that the update was skipped."""
    model: Sequence[torch.nn.Module]
    """The student's wrapped chunks."""
    optimizer: Any
    scheduler: Any


@dataclass
class Save:
    """A save of a checkpoint."""

    iteration: int | None
    """Iteration of the checkpoint. None means waiting for a background save to finish."""
    is_last: bool
    """Whether this is the last save of the job."""
    error: Exception | None = None
    """The exception that the save failed with, on every rank."""
    is_survived: bool = False
    """Whether a callback has handled the error, so that the job continues."""


class Callback:
    """Base class of callbacks: each method is one event of a job; override the ones you need.

    Callbacks run in the order in which they were given to the job.

    Example::

        class PrintLoss(Callback):
            def before_update(self, update):
                print(update.step, update.loss)

        pretrain_qad.main(callbacks=[PrintLoss()])
    """

    needs_initial_weights = False
    """Whether a resumed job also loads the weights that training started from, before ``student_ready``."""

    def job_begins(self, job: Any, resumes_at: int) -> None:
        """Called when the process groups exist and no model is loaded yet.

        Args:
            job: the ``training.job.QADJob``.
            resumes_at: iteration of the checkpoint that the job resumes from; 0 if it starts from scratch.
        """

    def phase(self, name: str, is_long: bool) -> None:
        """Called before a part that may take long and has no event of its own, such as loading a model.

        Args:
            is_long: whether the part reads or writes a whole model.
        """

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        """Called when the student has its weights and quantizers but is not yet wrapped; the teacher is loaded, too."""

    def step_begins(self, step: int, model: Sequence[torch.nn.Module]) -> None:
        """Called at the start of a training step, before its gradients are zeroed.

        Args:
            step: counted from 1.
            model: the student's wrapped chunks.
        """

    def forward_begins(self, batches: Sequence[Any], is_training: bool) -> None:
        """Called before the teacher's pass, when the microbatches of a step or of a part of an evaluation are read."""

    def student_begins(self, batches: Sequence[Any], is_training: bool) -> None:
        """Called before the student's schedule, when ``batches`` has the teacher's outputs and weights are quantized.

        In training the gradient buffers are zero, and the backward passes will add to their contents.
        """

    def forward_ended(self, reports: list[dict[str, torch.Tensor]], is_training: bool) -> None:
        """Called after the student's forward passes and, in training, its backward passes.

        Args:
            reports: the loss function's report for each microbatch, on the last stage; a callback may add entries.
        """

    def gradients_begin(self) -> None:
        """Called when this rank has finished its passes, before the gradients are reduced over all ranks."""

    def gradients_ready(self) -> None:
        """Called when the gradients are summed over all ranks and divided by the number of tokens."""

    def before_update(self, update: Update) -> None:
        """Called before the optimizer's update. A callback may set ``update.is_left_out`` to skip it."""

    def after_update(self, update: Update) -> None:
        """Called after the update was made or skipped."""

    def step_ended(self, step: TrainedStep) -> None:
        """Called at the end of a step, after the update of the learning rate."""

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        """Called after an evaluation.

        Args:
            iteration: number of steps trained before the evaluation.
            means: ``Metrics.means`` over all data-parallel ranks; meaningless on ranks that compute no loss.
        """

    def save_begins(self, save: Save) -> None:
        """Called before a checkpoint is written, or before waiting for a background save."""

    def save_ended(self, save: Save) -> None:
        """Called when a save has ended or failed, or continues in the background. May set ``save.is_survived``."""

    def job_ends(self, is_done: bool) -> None:
        """Called after the loop. ``is_done`` is False if the job stops early, by request or at its time limit."""

    def closes(self) -> None:
        """Called at the end of the job in this process, also after an error: other ranks may have ended already."""


class Events:
    """Passes each event to every callback.

    ``events.step_begins(3)`` calls ``step_begins(3)`` on each callback in order; an error in one of them ends the job.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self.callbacks = list(callbacks)

    def __getattr__(self, event: str):
        if not hasattr(Callback, event):
            raise AttributeError(f"there is no event {event!r}")
        listeners = [
            getattr(callback, event)
            for callback in self.callbacks
            if getattr(type(callback), event) is not getattr(Callback, event)
        ]

        def notify(*args, **kwargs) -> None:
            for listener in listeners:
                listener(*args, **kwargs)

        return notify
