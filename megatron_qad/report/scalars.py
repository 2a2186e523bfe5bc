"""The numbers that a run wrote to TensorBoard: read back whole, a resumed run joined into one history.

Left out: text, images and everything else in the files; wandb's own records.
"""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_qad.runtime.errors import QADError

VALIDATION = "validation/"
"""Prefix of what ``training.validation`` records at each evaluation."""

Curve = list[tuple[int, float]]
"""(step, value), steps rising."""


def read_scalars(run_dir: str | Path) -> dict[str, Curve]:
    """Every scalar of a run by its TensorBoard name, each step once.

    A job that stops and resumes writes one event file more each time. What a later file holds replaces what earlier
    files hold from its first step on: the resumed job went back to its checkpoint, and what followed before is no part
    of its history. Within a file the last value of a step counts (Megatron evaluates again when training ends).

    Args:
        run_dir: a job's ``--save`` directory with its events in ``tensorboard/``, or the directory of the events.

    Raises:
        QADError: no such directory, no event file in it, or no scalar in its event files.
    """
    scalars: dict[str, dict[int, float]] = {}
    for events in _by_time(_event_files(Path(run_dir))):
        for name in events.Tags()["scalars"]:
            written = {event.step: event.value for event in events.Scalars(name)}
            kept = {step: value for step, value in scalars.get(name, {}).items() if step < min(written)}
            scalars[name] = kept | written
    if not scalars:
        raise QADError(
            f"{run_dir}: its TensorBoard event files hold no scalars; the job stopped before its first iteration or "
            "evaluation. Run it further, or look at its log"
        )
    return {name: sorted(values.items()) for name, values in scalars.items()}


def last_validation(run_dir: str | Path) -> dict[str, float]:
    """The metrics of a run's last evaluation, and its "iteration".

    Keys are those of ``distillation.metrics``: "kl_to_teacher", "cross_entropy", "teacher_cross_entropy" (nats a
    token), "top1_agreement" (a share), "num_tokens"; without a teacher only "cross_entropy" and "num_tokens".
    TensorBoard keeps float32: num_tokens is exact up to 2^24.

    Raises:
        QADError: as ``read_scalars``, or the run never evaluated.
    """
    metrics = validation_of(read_scalars(run_dir))
    if not metrics:
        raise QADError(
            f"{run_dir}: no evaluation is recorded (no scalar {VALIDATION}...); run the job with --eval-iters and a "
            "validation part in --split"
        )
    return metrics


def validation_of(scalars: dict[str, Curve]) -> dict[str, float]:
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


def _by_time(files: list[Path]) -> list[EventAccumulator]:
    """The files' contents, oldest first, by what is written in them: names order by process within one second."""
    loaded = []
    for file in files:
        # 0: keep every value; the default is a random sample of 10,000. Texts are Megatron's arguments.
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 1})
        events.Reload()
        if events.Tags()["scalars"]:
            loaded.append(events)
    return sorted(loaded, key=lambda events: events.FirstEventTimestamp())
