"""Data of one run for the report: curves, last evaluation and job record."""

from dataclasses import dataclass
from pathlib import Path

from megatron_qad.distillation.loss_registry import training_losses
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.models.checkpoint_config import read_job
from megatron_qad.report.expert_table import Experts
from megatron_qad.report.scalars import VALIDATION, Curve, read_scalars, validation_metrics
from megatron_qad.report.weight_errors import has_checkpoint


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

    @classmethod
    def read(cls, name: str, directory: str | Path, accept_gaps: bool = False) -> "Run":
        """Read a run. Raises QADError as ``read_scalars`` does."""
        notes: list[str] = []
        scalars = read_scalars(directory, accept_gaps=accept_gaps, notes=notes)
        saved_iteration = None
        if has_checkpoint(directory):
            saved_iteration = iteration_to_read(directory).name.removeprefix("iter_").lstrip("0")
        experts, validation = Experts.read(directory), validation_metrics(scalars)
        return cls(
            name, str(directory), scalars, validation, read_job(directory), saved_iteration, experts, tuple(notes)
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

    def validation_curve(self, metric: str) -> Curve:
        """Return the curve of a validation metric; empty if it was not recorded."""
        return self.scalars.get(VALIDATION + metric, [])
