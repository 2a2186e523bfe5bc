"""Read the TensorBoard scalars of a run, joining the event files of a resumed run into one history.

Not supported: other contents of the files (text, images), and wandb's own records.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.metric_writer import VS_SAMPLES
from megatron_qad.report.event_files import read_events

VALIDATION = "validation/"
"""Prefix of the scalars that ``training.callbacks.validation`` records at each evaluation."""

Curve = list[tuple[int, float]]
"""List of (step, value) with ascending steps."""


@dataclass(frozen=True)
class History:
    """The events of all starts of a run."""

    scalars: dict[str, Curve]
    """Every scalar by its TensorBoard name, with one value per step."""
    notes: list[str]
    """Notes about the files, as sentences."""
    seconds: float
    """Time from the first to the last event of each start, summed; includes steps that a resumed job repeated."""
    ended: float
    """Time of the last event, in seconds since 1970."""


def read_scalars(run_dir: str | Path, *, accept_gaps: bool = False, notes: list[str] | None = None) -> dict[str, Curve]:
    """Return ``scalars`` of ``read_history``, and append its notes to ``notes``."""
    history = read_history(run_dir, accept_gaps=accept_gaps)
    if notes is not None:
        notes += history.notes
    return history.scalars


def read_history(run_dir: str | Path, *, accept_gaps: bool = False) -> History:
    """Read the event files of a run.

    Each start of a job writes a new event file. From its first step on, a later file replaces the values of earlier
    files: the resumed job went back to a checkpoint, so later steps of the earlier start were abandoned. Within a file
    the last value of a step is used (Megatron evaluates again when training ends).

    Args:
        run_dir: a job's ``--save`` directory with its events in ``tensorboard/``, or the directory of the events.
        accept_gaps: read the undamaged part of damaged event files.

    Raises:
        QADError: a missing directory, no event file, no scalar in the event files, or an event file that is damaged or
            does not match the record in the job's checkpoints.
    """
    events = read_events(_event_files(Path(run_dir)), Path(run_dir), accept_gaps)
    scalars: dict[str, dict[int, float]] = {}
    current_start = None
    for file in events.files:
        if (
            file.start is not None and file.start[0] != current_start
        ):  # also truncates scalars that this start did not write
            current_start, resumed_iteration = file.start
            for name in [name for name in scalars if not name.endswith(VS_SAMPLES)]:
                scalars[name] = {step: value for step, value in scalars[name].items() if step <= resumed_iteration}
        for name, written in file.scalars.items():
            kept = {step: value for step, value in scalars.get(name, {}).items() if step < min(written)}
            scalars[name] = kept | written
    if not any(scalars.values()):
        raise QADError(
            f"{run_dir}: its TensorBoard event files have no scalars; the job stopped before its first iteration or "
            "evaluation. Resume the job, or check its log."
        )
    return History(
        {name: sorted(values.items()) for name, values in scalars.items() if values},
        events.notes,
        seconds=sum(max(file.last_time - file.time, 0.0) for file in events.files),
        ended=max(file.last_time for file in events.files),
    )


def last_validation(run_dir: str | Path) -> dict[str, float]:
    """Return the metrics of a run's last evaluation, and its "iteration".

    Keys are those of ``distillation.metrics``: "kl_to_teacher", "cross_entropy", "teacher_cross_entropy" (nats per
    token), "top1_agreement" (a share), "num_tokens"; without a teacher only "cross_entropy" and "num_tokens".
    TensorBoard stores float32, so num_tokens is exact up to 2^24.

    Raises:
        QADError: as in ``read_scalars``, or the run never evaluated.
    """
    metrics = validation_metrics(read_scalars(run_dir))
    if not metrics:
        raise QADError(
            f"{run_dir}: no evaluation is recorded (no scalar {VALIDATION}...). Run the job with --eval-iters and a "
            "validation share in --split."
        )
    return metrics


def validation_metrics(scalars: dict[str, Curve]) -> dict[str, float]:
    """Return the metrics of the last evaluation from a run's scalars; empty if no evaluation is recorded."""
    curves = {name.removeprefix(VALIDATION): curve for name, curve in scalars.items() if name.startswith(VALIDATION)}
    if not curves:
        return {}
    iteration = max(curve[-1][0] for curve in curves.values())
    return {
        **{name: curve[-1][1] for name, curve in curves.items() if curve[-1][0] == iteration},
        "iteration": iteration,
    }


def _event_files(run_dir: Path) -> list[Path]:
    if not run_dir.is_dir():
        raise QADError(f"{run_dir}: no such directory. Give a run's --save or --tensorboard-dir directory.")
    for directory in (run_dir / "tensorboard", run_dir):
        if files := sorted(directory.glob("events.out.tfevents.*")):
            return files
    raise QADError(
        f"{run_dir}: no TensorBoard event files in it or in its tensorboard/ directory. Run the job with "
        f"--tensorboard-dir {run_dir}/tensorboard, or give the directory of its event files."
    )
