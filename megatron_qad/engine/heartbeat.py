"""Detects hanging jobs: records the position of each rank, and reports which rank is behind when progress stops.

``beat`` costs a few assignments: a thread writes the rank's position to the rank's file every few seconds and checks
for progress. A collective that waits for a hanging rank looks the same on gloo and NCCL, so progress is timed, with a
limit slightly shorter than the process groups' own timeout. When it is exceeded, the thread reads the files of the
other ranks, reports the rank that is behind, and ends the process; the launcher then ends the job. Dead ranks are not
handled here: the launcher notices them at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.new_files import open_new
from megatron_qad.engine.text_files import read_json

_MAX_SECONDS_BETWEEN = 5
_GRACE_SECONDS = 30
_LONG = 10  # factor on the limit for phases that read or write the whole model
_MAX_LISTED = 8


class Heartbeat:
    """Tracks the position of this process in its job. Nothing is written or watched before ``start``.

    Args:
        passes: returns a count of the progress within a phase, such as its microbatches.
    """

    def __init__(self, passes: Callable[[], int] = lambda: 0):
        self.step, self.phase = 0, "start"
        self._passes = passes
        self._has_ended = threading.Event()
        self._num_phases, self._time, self._patience = 0, time.time(), _LONG
        self._file: Path | None = None

    def beat(self, phase: str, step: int | None = None, is_long: bool = False) -> None:
        """Record that the rank enters ``phase``. All ranks enter the same phases in the same order.

        Args:
            is_long: whether the phase loads or saves, which may take ten times as long as other phases.
        """
        self.phase, self.step = phase, self.step if step is None else step
        self._num_phases += 1
        self._time = time.time()
        self._patience = _LONG if is_long else 1  # set after the time, so that the short limit never meets an old time

    def start(self, directory: Path | None, rank: int, size: int, hang_timeout: float) -> None:
        """Start to write the position to ``directory`` and to watch for progress.

        Args:
            directory: None means that no files are written, so that a report covers this rank only.
            hang_timeout: seconds without progress after which the process ends; ten times as many in a long phase,
                such as the start.
        """
        self._rank, self._size, self._hang_timeout = rank, size, hang_timeout
        if directory is not None:
            self._file = _heartbeat_file(directory, rank)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file.unlink(missing_ok=True)  # from an earlier job
            except OSError as error:
                print(f"megatron_qad: ERROR: heartbeats in {directory}: {error}. The job continues.", flush=True)
        self._every = min(_MAX_SECONDS_BETWEEN, hang_timeout / 40)
        self._started = self._time = time.time()
        threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()

    def stop(self) -> None:
        """Stop writing and watching."""
        self._has_ended.set()

    def _watch(self) -> None:
        written, last_passes = None, self._passes()
        while not self._has_ended.is_set():
            if (passes := self._passes()) != last_passes:
                last_passes, self._time = passes, time.time()
            place = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "step": self.step}
            place |= {"phase": self.phase, "num_phases": self._num_phases, "time": self._time}
            if self._file is not None and place != written:
                if self._write(place):  # a full disk must not end a job; the next round tries again
                    written = place
            limit = self._hang_timeout * self._patience  # read before the time, because ``beat`` sets it after the time
            if (waited := time.time() - self._time) > limit:
                self._report(place, waited, limit)
            self._has_ended.wait(self._every)

    def _write(self, place: dict) -> bool:
        """Write the position to the rank's file. Returns whether that succeeded; if not, nothing is left behind."""
        aside = self._file.with_suffix(".new")
        try:
            with open_new(aside) as stream:
                stream.write(json.dumps(place))
            aside.replace(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            return False
        return True

    def _report(self, local: dict, waited: float, limit: float) -> None:
        places = self._read_places() | {local["rank"]: local}
        ahead = max(place["num_phases"] for place in places.values())
        reporter = min(rank for rank, place in places.items() if place["num_phases"] == ahead)
        if local["rank"] != reporter and waited < limit + _GRACE_SECONDS:
            return  # one report is enough; the reporting rank ends the job
        order = sorted(places.values(), key=lambda place: (place["num_phases"], place["time"]))
        listing = "; ".join(
            f"rank {p['rank']} on {p['host']} in step {p['step']}, {p['phase']}, {time.time() - p['time']:.0f} s ago"
            for p in order[:_MAX_LISTED]
        )
        behind = "furthest behind first" if order[0]["num_phases"] < ahead else "all in one phase, longest silent first"
        print(
            f"error: no progress for {waited:.0f} s. Last seen, {behind}: {listing}"
            f"{f'; and {len(order) - _MAX_LISTED} more' if len(order) > _MAX_LISTED else ''}. "
            f"Check rank {order[0]['rank']}: its process (pid {order[0]['pid']}), device and network.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _read_places(self) -> dict[int, dict]:
        places = {}
        for rank in range(self._size) if self._file is not None else ():
            try:
                places[rank] = read_json(_heartbeat_file(self._file.parent, rank))
            except QADError:  # it has not started, or is writing
                places[rank] = {"rank": rank, "host": "an unknown host", "pid": "unknown", "step": 0}
                places[rank] |= {"phase": "never seen", "num_phases": -1, "time": self._started}
        return places


def _heartbeat_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"
