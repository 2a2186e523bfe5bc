"""The events of a job, and the callbacks that subscribe to them.

``engine.loop`` reports what Megatron's loop does, ``training.job`` what QAD adds to it. A callback is a class with the
events that it wants. Every rank runs the same callbacks in the same order, so that a callback may call collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Update:
    """An optimizer's update that is about to happen; callbacks may leave it out.

    The numbers are the same on every rank.
    """

    step: int
    """The step that it belongs to, counted from 1."""
    model: Sequence[torch.nn.Module]
    """The student's wrapped chunks, with this step's gradients."""
    loss: float
    """Mean loss of a counted token."""
    num_tokens: float
    """Tokens that count in the loss, as often as ranks compute their loss."""
    is_finite: bool
    """Whether all losses and gradients are."""
    is_left_out: bool = False
    """Weights, optimizer and learning rate stay; the step's data is used up."""


@dataclass(frozen=True)
class TrainedStep:
    """A training step that is done."""

    number: int
    """Counted from 1."""
    losses: dict[str, torch.Tensor]
    """Mean of each reported loss over all counted tokens, on the last pipeline stage."""
    grad_norm: float | None
    """None where the update was left out."""
    model: Sequence[torch.nn.Module]
    """The student's wrapped chunks."""
    optimizer: Any
    scheduler: Any


@dataclass
class Save:
    """A save of a checkpoint."""

    iteration: int | None
    """None: a save in the background whose end is waited for."""
    is_last: bool
    """No other save of this job follows."""
    error: Exception | None = None
    """What it failed by, on every rank."""
    is_survived: bool = False
    """A callback has dealt with the error, and the job goes on."""


class Callback:
    """Subscribes to a job's events. Each method is one event; override those that you want.

    Callbacks run in the order in which they were given to the job.
    """

    needs_initial_weights = False
    """A job that resumes loads the weights that training started from, too, before ``student_ready``."""

    def job_begins(self, job: Any, resumes_at: int) -> None:
        """The ranks know each other, and no model is loaded yet.

        Args:
            job: the ``training.job.QADJob``.
            resumes_at: iteration of the checkpoint that the job goes on from; 0: it begins.
        """

    def phase(self, name: str, is_long: bool) -> None:
        """The job enters a part that may take long and that no other event names, such as loading a model.

        Args:
            is_long: it reads or writes a whole model.
        """

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        """The student has its weights and quantizers and is not yet wrapped; the teacher is there, too."""

    def step_begins(self, step: int, model: Sequence[torch.nn.Module]) -> None:
        """A training step begins; its gradients are not yet zeroed.

        Args:
            step: counted from 1.
            model: the student's wrapped chunks.
        """

    def forward_begins(self, batches: Sequence[Any], is_training: bool) -> None:
        """The microbatches of a step, or of a part of an evaluation, are read; the teacher's pass comes next."""

    def student_begins(self, batches: Sequence[Any], is_training: bool) -> None:
        """The teacher's outputs are in ``batches`` and the weights are quantized; the student's schedule comes next.

        In training the gradient buffers are zero, and the backward passes will add to what is in them.
        """

    def forward_ended(self, reports: list[dict[str, torch.Tensor]], is_training: bool) -> None:
        """The student's passes are done, in training the backward passes, too.

        Args:
            reports: what the loss function reported of each microbatch, on the last stage; a callback may add to them.
        """

    def gradients_begin(self) -> None:
        """This rank's own passes are done; reducing the gradients over all ranks comes next."""

    def gradients_ready(self) -> None:
        """The gradients are summed over all ranks and divided by the number of tokens."""

    def before_update(self, update: Update) -> None:
        """The optimizer's update comes next, unless a callback sets ``update.is_left_out``."""

    def after_update(self, update: Update) -> None:
        """The update was made, or left out."""

    def step_ended(self, step: TrainedStep) -> None:
        """The step is done, its learning rate, too."""

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        """An evaluation has ended.

        Args:
            iteration: steps that were trained before it.
            means: ``Metrics.means`` over all data-parallel ranks; on ranks that compute no loss, without meaning.
        """

    def save_begins(self, save: Save) -> None:
        """A checkpoint is going to be written, or one that is written in the background is waited for."""

    def save_ended(self, save: Save) -> None:
        """A save has ended or failed, or goes on in the background. A callback may set ``save.is_survived``."""

    def job_ends(self, is_done: bool) -> None:
        """The loop has ended. ``is_done`` False: the job leaves early, because it was asked to or its time is up."""

    def closes(self) -> None:
        """The job is over in this process, also where an error ended it: other ranks may be gone."""


class Events:
    """Passes each event to every callback.

    ``events.step_begins(3)`` calls ``step_begins(3)`` of each callback in turn; an error in one of them ends the job.
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

        def tell(*args, **named) -> None:
            for listener in listeners:
                listener(*args, **named)

        return tell
