"""The writer of a job's metrics: TensorBoard, wandb and ``metrics.jsonl`` get the same scalars under the same names.

Megatron and the callbacks see one TensorBoard writer. What Megatron logs to wandb itself is dropped, because it has
other names and lacks some scalars.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from megatron_qad.engine.event_writer import FailureLog, JobWriter

VS_SAMPLES = " vs samples"
"""Suffix of Megatron's second copy of each scalar, whose steps are samples. Jobs of earlier versions wrote them."""


class MetricWriter:
    """Passes each scalar to TensorBoard at once, and the scalars of a step together to the other receivers.

    Args:
        tensorboard: writer of the event files; None without ``--tensorboard-dir``.

    Example::

        writer = MetricWriter(None)
        writer.receivers.append(MetricsFile(Path("run/metrics.jsonl")).append)
        writer.add_scalar("kl loss", 0.25, 1)
        writer.close()  # run/metrics.jsonl: {"step": 1, "time": "2026-11-30T08:00:00", "kl loss": 0.25}
    """

    def __init__(self, tensorboard: JobWriter | None):
        self.tensorboard = tensorboard
        self.receivers: list[Callable[[int, Mapping[str, float]], None]] = []
        """Called with the step and its scalars by name. They must not raise."""
        self._step: int | None = None
        self._scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value, step: int, *args, **kwargs) -> None:
        """Write one scalar. A scalar of another step completes the step before it."""
        if name.endswith(VS_SAMPLES):
            return
        if self.tensorboard is not None:
            self.tensorboard.add_scalar(name, value, step, *args, **kwargs)
        if step != self._step:
            self._end_step()
        self._step, self._scalars[name] = step, float(value)

    def add_text(self, *args, **kwargs) -> None:
        """Write a text, which only TensorBoard gets: Megatron's arguments, which wandb has as its config."""
        if self.tensorboard is not None:
            self.tensorboard.add_text(*args, **kwargs)

    def flush(self) -> None:
        """Write everything that waits. Scalars of the same step that follow become a second row."""
        self._end_step()
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def close(self) -> None:
        """Flush, and end the event file."""
        self._end_step()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _end_step(self) -> None:
        scalars, self._scalars = self._scalars, {}
        if scalars:
            for receive in self.receivers:
                receive(self._step, scalars)


class MetricsFile:
    """A JSON-lines file with one row per step: "step", "time" (local, to the second) and the scalars by name.

    A resumed job appends, so a step that is not above the one before it marks a resumed job, and replaces the rows from
    that step on. Values that are not finite are null. Rows that cannot be written are lost; each kind of error is
    printed once.
    """

    def __init__(self, file: Path):
        self._file, self._failures = file, FailureLog(str(file))

    def append(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one row; a row that a killed job left incomplete is ended first."""
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        row = {"step": step, "time": datetime.now().isoformat(timespec="seconds")} | values
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a+b") as stream:
                start = b""
                if stream.seek(0, os.SEEK_END):
                    stream.seek(-1, os.SEEK_END)
                    start = b"" if stream.read(1) == b"\n" else b"\n"
                stream.write(start + json.dumps(row).encode() + b"\n")
        except OSError as error:
            self._failures.report(error)
