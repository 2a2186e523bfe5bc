"""The wandb run of a job: one run for all starts of a directory, and errors that do not end the job."""

import secrets
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from megatron_qad.engine.event_writer import FailureLog
from megatron_qad.engine.run_directory import manifest


class Guarded:
    """A proxy of ``wandb`` whose functions, including those of its ``run`` and ``config``, return None on an error."""

    def __init__(self, guarded, failures: FailureLog):
        self._guarded, self._failures = guarded, failures

    def __getattr__(self, name: str):
        try:
            value = getattr(self._guarded, name)
        except Exception as error:
            self._failures.report(error)
            return None
        if callable(value):
            return never_raise(value, self._failures)
        return value if isinstance(value, (str, int, float, type(None))) else Guarded(value, self._failures)

    def __eq__(self, other) -> bool:  # Megatron's timers check whether their writer is wandb
        return other is self._guarded or isinstance(other, Guarded) and other._guarded is self._guarded

    __hash__ = object.__hash__


class WandbWriter(Guarded):
    """What Megatron gets as its wandb writer. The scalars come from ``MetricWriter`` alone.

    Args:
        wandb: the module, with a run.
        failures: prints its errors.
        flush: writes the scalars that wait.
    """

    def __init__(self, wandb, failures: FailureLog, flush: Callable[[], None]):
        super().__init__(wandb, failures)
        self._flush = flush

    def log(self, *args, **kwargs) -> None:
        """Do nothing: Megatron's own scalars would come twice, some of them under another name."""

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the scalars of a step by name."""
        never_raise(self._guarded.log, self._failures)(dict(scalars), step=step)

    def finish(self) -> None:
        """Write the scalars that wait, and end the run."""
        self._flush()
        never_raise(self._guarded.finish, self._failures)()

    def print_upload(self, directory: str) -> None:
        """Print the command that uploads an offline run, with the files of all its starts.

        Args:
            directory: parent of wandb's own directory, which is called "wandb".
        """
        if self.run is not None and self.run.offline:
            files = Path(directory) / "wandb" / f"offline-run-*-{self.run.id}"
            print(f"megatron_qad: wandb is offline. To upload this run: wandb sync {files}", flush=True)


def never_raise(function: Callable, failures: FailureLog, errors: type[Exception] = Exception) -> Callable:
    """Return ``function`` with its errors reported instead of raised; it then returns None."""

    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except errors as error:
            failures.report(error)
            return None

    return call


def continue_wandb_run(project: str | None, save: str | None, environ: MutableMapping[str, str]) -> None:
    """Give every start with the same ``--save`` directory the same wandb run. ``WANDB_RUN_ID`` takes precedence.

    Does nothing except on the last rank, where Megatron logs to wandb. Must run before Megatron parses its flags, which
    starts the wandb run.
    """
    is_last = int(environ.get("RANK", "0")) == int(environ.get("WORLD_SIZE", "1")) - 1
    if not project or save is None or not is_last:
        return
    file = Path(save) / "wandb_run_id.txt"
    name = ""
    try:
        name = file.read_text().strip() if file.is_file() else ""
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"megatron_qad: ERROR: {file}: {error}. This start is logged as a new wandb run.", flush=True)
    else:
        if not name:  # no file, or an empty one after a full disk
            name = environ.get("WANDB_RUN_ID", secrets.token_hex(4))
            manifest.write_or_warn(file, name)  # if it fails, the next start is a new wandb run
    environ.setdefault("WANDB_RUN_ID", name or secrets.token_hex(4))
    environ.setdefault("WANDB_RESUME", "allow")
