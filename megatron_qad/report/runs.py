"""Data of one run for the report: curves, last evaluation and job record."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.checkpoint.megatron_settings import read_settings
from megatron_qad.distillation.loss_registry import training_losses
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.models.checkpoint_config import read_job
from megatron_qad.report.expert_table import Experts
from megatron_qad.report.scalars import VALIDATION, Curve, read_history, validation_metrics
from megatron_qad.report.weight_errors import has_checkpoint
from megatron_qad.training.advice import CHANGE_NOISE, Measured, advice


@dataclass
class Run:
    """The files of one run, read for the report."""

    name: str
    directory: str
    """Directory as given by the user."""
    scalars: dict[str, Curve]
    validation: dict[str, float]
    """Metrics of the last evaluation (``last_validation``); empty if the run never evaluated."""
    job: dict | None
    """Contents of ``qad.json``; None if the file does not exist."""
    checkpoint_iteration: str | None
    """Iteration of latest_checkpointed_iteration.txt; None if no checkpoint was saved."""
    experts: Experts = Experts()
    event_notes: tuple[str, ...] = ()
    """Notes about the event files, as sentences."""
    seconds: float | None = None
    """Time of all starts of the job, from its first to its last event. None: unknown."""
    ended: float | None = None
    """Time of the last event, in seconds since 1970."""
    num_tokens: int | None = None
    """Tokens that training had read when the checkpoint was saved. None: the checkpoint does not say."""

    @classmethod
    def read(cls, name: str, directory: str | Path, accept_gaps: bool = False) -> "Run":
        """Read a run. Raises QADError as ``read_history`` does."""
        history = read_history(directory, accept_gaps=accept_gaps)
        saved_iteration = num_tokens = None
        if has_checkpoint(directory):
            iteration = iteration_to_read(directory)
            saved_iteration = iteration.name.removeprefix("iter_").lstrip("0")
            num_tokens = _trained_tokens(iteration)
        return cls(
            name,
            str(directory),
            history.scalars,
            validation_metrics(history.scalars),
            read_job(directory),
            saved_iteration,
            Experts.read(directory),
            tuple(history.notes),
            history.seconds,
            history.ended,
            num_tokens,
        )

    @property
    def training_loss(self) -> tuple[str, Curve]:
        """(TensorBoard name, curve) of the training loss, for a sum of losses its total; ("", []) if there is none."""
        return next(((name, self.scalars[name]) for name in training_losses(self.scalars)), ("", []))

    @property
    def is_trained(self) -> bool:
        """Whether any iteration had a learning rate above 0. PTQ has no iteration; older jobs ran one at 0."""
        rates = self.scalars.get("learning-rate")
        return bool(self.training_loss[1]) and (rates is None or any(rate > 0 for _, rate in rates))

    @property
    def has_no_counted_tokens(self) -> bool:
        """Whether no token counted in the last evaluation, so that its means are undefined."""
        return self.validation.get("num_tokens") == 0

    @property
    def num_iterations(self) -> int:
        """Number of training iterations: the last one that reported a loss."""
        return self.training_loss[1][-1][0] if self.is_trained else 0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the log's lines of the training speed; None if it was not recorded."""
        speeds = [speed for _, speed in self.scalars.get("speed/tokens_per_second", [])]
        return statistics.median(speeds) if speeds and self.is_trained else None

    @property
    def training_losses(self) -> dict[str, Curve]:
        """Curves of all training losses by their TensorBoard names; of a sum of losses also each term."""
        return {name: self.scalars[name] for name in training_losses(self.scalars)} if self.is_trained else {}

    @property
    def advice(self) -> str | None:
        """The line of advice after the last validation (``training.advice``); None if the run was not trained."""
        noise = dict(self.scalars.get(CHANGE_NOISE, []))
        entropies = dict(self.validation_curve("teacher_cross_entropy"))
        history = [
            Measured(iteration, kl, entropies.get(iteration, 0.0), noise.get(iteration))
            for iteration, kl in self.validation_curve("kl_to_teacher")
        ]
        return advice(history) if self.is_trained and len(history) > 1 else None

    def validation_curve(self, metric: str) -> Curve:
        """Return the curve of a validation metric; empty if it was not recorded."""
        return self.scalars.get(VALIDATION + metric, [])


def _trained_tokens(iteration: Path) -> int | None:
    """Return the number of tokens that training had read, from the settings in a checkpoint."""
    manifest.verify_file(iteration / "metadata.json")  # Megatron reads it first
    settings, _ = read_settings(iteration)
    samples, length = settings.get("consumed_train_samples"), settings.get("seq_length")
    return samples * length if isinstance(samples, int) and isinstance(length, int) else None
