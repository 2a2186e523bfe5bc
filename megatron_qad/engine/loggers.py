"""Loggers that never end a job: TensorBoard event files, wandb, metrics.jsonl and Megatron's progress log.

Each kind of failure of a logger is printed once, on one line, and the job continues. ``Loggers`` replaces Megatron's
loggers. ``metric_writer`` passes the scalars on, ``event_writer`` writes TensorBoard's files, ``wandb_run`` guards
wandb, and ``console`` the terminal. Failures of the job's own small files are handled by
``engine.run_directory.manifest.write_or_warn`` and ``preemption``.
"""

import argparse
import atexit
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron.training import global_vars

from megatron_qad.engine.event_record import EventRecord
from megatron_qad.engine.event_writer import FailureLog, JobWriter
from megatron_qad.engine.metric_writer import MetricsFile, MetricWriter
from megatron_qad.engine.patches import replace
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE, METRICS_FILE
from megatron_qad.engine.wandb_run import WandbWriter, never_raise


class Loggers:
    """The loggers of a job. Call ``install`` before Megatron parses its flags, because parsing starts the loggers.

    Args:
        save: ``--save``.
        tensorboard_dir: ``--tensorboard-dir``.
        wandb_dir: directory of wandb's files.
    """

    def __init__(self, save: str | None, tensorboard_dir: str | None, wandb_dir: str):
        self._save, self._tensorboard_dir, self._wandb_dir = save, tensorboard_dir, wandb_dir

    def install(self) -> None:
        """Replace Megatron's loggers by those of this module."""
        replace("megatron.training.global_vars:_set_tensorboard_writer", lambda _: self._set_metric_writer)
        wandb_failures = FailureLog(f"wandb in {self._wandb_dir}")

        def guard(start: Callable) -> Callable:
            def set_wandb_writer(args: argparse.Namespace) -> None:
                never_raise(start, wandb_failures)(args)
                wandb, metrics = global_vars.get_wandb_writer(), global_vars.get_tensorboard_writer()
                if wandb is not None:
                    writer = global_vars._GLOBAL_WANDB_WRITER = WandbWriter(wandb, wandb_failures, metrics.flush)
                    metrics.receivers.append(writer.log_scalars)
                    writer.print_upload(self._wandb_dir)

            return set_wandb_writer

        replace("megatron.training.global_vars:_set_wandb_writer", guard)
        # Logs a checkpoint to wandb and writes a small file next to the checkpoints.
        guard_wandb = partial(never_raise, failures=wandb_failures)
        replace("megatron.training.wandb_utils:on_save_checkpoint_success", guard_wandb)
        guard_disk = partial(never_raise, failures=FailureLog(f"the progress log in {self._save}"), errors=OSError)
        for module in ("training", "checkpointing"):
            replace(f"megatron.training.{module}:append_to_progress_log", guard_disk)

    def event_record(self) -> Callable[[], str] | None:
        """Return a function for the record of the event files (``event_record``); None if there are no such files."""
        if not self._tensorboard_dir or self._save is None:
            return None
        return EventRecord(Path(self._tensorboard_dir), Path(self._save)).text

    def _set_metric_writer(self, args: argparse.Namespace) -> None:
        if args.rank != args.world_size - 1 or not (args.tensorboard_dir or args.save or args.wandb_project):
            return
        tensorboard = None
        if args.tensorboard_dir:
            tensorboard = JobWriter(
                args.tensorboard_dir,
                args.tensorboard_queue_size,
                lambda: getattr(args, "iteration", 0),
                Path(args.save) / EVENTS_FILE if args.save is not None else None,
            )
        metrics = global_vars._GLOBAL_TENSORBOARD_WRITER = MetricWriter(tensorboard)
        if args.save is not None:
            metrics.receivers.append(MetricsFile(Path(args.save) / METRICS_FILE).append)
        atexit.register(self.close)

    def close(self) -> None:
        """Write pending metrics, and the record of the final event files in the run directory."""
        metrics = global_vars.get_tensorboard_writer()
        if not isinstance(metrics, MetricWriter):
            return
        metrics.close()
        writes_events = metrics.tensorboard is not None and metrics.tensorboard.file_writer is not None
        if writes_events and self._save is not None and Path(self._save).is_dir():
            record = EventRecord(Path(self._tensorboard_dir), Path(self._save))
            manifest.write_or_warn(Path(self._save) / EVENTS_FILE, record.text())
