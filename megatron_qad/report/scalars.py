"""The numbers that a run wrote to TensorBoard: read back whole, a resumed run joined into one history.

Left out: text, images and everything else in the files; wandb's own records.
"""

from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.report.event_files import read_events

VALIDATION = "validation/"
"""Prefix of what ``training.callbacks.validation`` records at each evaluation."""

Curve = list[tuple[int, float]]
"""(step, value), steps rising."""


_VS_SAMPLES = " vs samples"
"""End of the names of Megatron's scalars whose steps are samples, not iterations."""


def read_scalars(run_dir: str | Path, *, accept_gaps: bool = False, notes: list[str] | None = None) -> dict[str, Curve]:
    """Every scalar of a run by its TensorBoard name, each step once.

    A job that stops and resumes writes one event file more each time. What a later file holds replaces what earlier
    files hold from its first step on: the resumed job went back to its checkpoint, and what followed before is no part
    of its history. Within a file the last value of a step counts (Megatron evaluates again when training ends).

    Args:
        run_dir: a job's ``--save`` directory with its events in ``tensorboard/``, or the directory of the events.
        accept_gaps: read what is left of damaged event files.
        notes: takes what a reader must know of the files, in sentences.

    Raises:
        QADError: no such directory, no event file in it, or no scalar in its event files; or an event file that is
            damaged, or not what the job's checkpoints say.
    """
    events = read_events(_event_files(Path(run_dir)), Path(run_dir), accept_gaps)
    if notes is not None:
        notes += events.notes
    scalars: dict[str, dict[int, float]] = {}
    number = None
    for file in events.files:
        if file.start is not None and file.start[0] != number:  # also scalars that this start did not get to
            number, at = file.start
            for name in [name for name in scalars if not name.endswith(_VS_SAMPLES)]:
                scalars[name] = {step: value for step, value in scalars[name].items() if step <= at}
        for name, written in file.scalars.items():
            kept = {step: value for step, value in scalars.get(name, {}).items() if step < min(written)}
            scalars[name] = kept | written
    if not any(scalars.values()):
        raise QADError(
            f"{run_dir}: its TensorBoard event files hold no scalars; the job stopped before its first iteration or "
            "evaluation. Run it further, or look at its log"
        )
    return {name: sorted(values.items()) for name, values in scalars.items() if values}


def last_validation(run_dir: str | Path) -> dict[str, float]:
    """The metrics of a run's last evaluation, and its "iteration".

    Keys are those of ``distillation.metrics``: "kl_to_teacher", "cross_entropy", "teacher_cross_entropy" (nats a
    token), "top1_agreement" (a share), "num_tokens"; without a teacher only "cross_entropy" and "num_tokens".
    TensorBoard keeps float32: num_tokens is exact up to 2^24.

    Raises:
        QADError: as ``read_scalars``, or the run never evaluated.
    """
    metrics = validation_metrics(read_scalars(run_dir))
    if not metrics:
        raise QADError(
            f"{run_dir}: no evaluation is recorded (no scalar {VALIDATION}...); run the job with --eval-iters and a "
            "validation part in --split"
        )
    return metrics


def validation_metrics(scalars: dict[str, Curve]) -> dict[str, float]:
    """``last_validation`` of scalars that are read already; empty where no evaluation is recorded."""
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
        raise QADError(f"{run_dir}: no such directory; expected a run's --save or --tensorboard-dir directory")
    for directory in (run_dir / "tensorboard", run_dir):
        if files := sorted(directory.glob("events.out.tfevents.*")):
            return files
    raise QADError(
        f"{run_dir}: no TensorBoard events in it or in its tensorboard/; run the job with "
        f"--tensorboard-dir {run_dir}/tensorboard, or name the directory that holds its events"
    )
