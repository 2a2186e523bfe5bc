"""Where each rank was last seen, and which one is behind when nothing moves any more.

``beat`` costs two assignments: a thread writes the rank's place to a file of its own every few seconds, and watches
that there is progress. A collective that waits for a rank that hangs looks the same on gloo and NCCL, so it is the
progress that is timed, a little shorter than the process groups' own timeout. Then the thread reads the others' files,
says who is behind, and ends the process, after which the launcher ends the job. Left out: ranks that die, which the
launcher notices at once.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_MAX_SECONDS_BETWEEN = 5
_GRACE_SECONDS = 30
_LONG = 10  # times the limit of a part of a step: what the whole model is read or written in
_MAX_NAMED = 8


class Heartbeat:
    """This process's place in its job. Nothing is written or watched before ``start``.

    Args:
        passes: counts what moves within a phase: the microbatches of it.
    """

    def __init__(self, passes: Callable[[], int] = lambda: 0):
        self.step, self.phase = 0, "start"
        self._passes = passes
        self._has_ended = threading.Event()
        self._num_phases, self._time, self._patience = 0, time.time(), _LONG
        self._file: Path | None = None

    def beat(self, phase: str, step: int | None = None, is_long: bool = False) -> None:
        """The rank enters ``phase``. All ranks enter the same ones in the same order.

        Args:
            is_long: loading or saving, which may take ten times as long as a part of a step.
        """
        self.phase, self.step = phase, self.step if step is None else step
        self._num_phases += 1
        self._time = time.time()
        self._patience = _LONG if is_long else 1  # after the time: never is a long phase's time held to the short limit

    def start(self, directory: Path | None, rank: int, size: int, hang_timeout: float) -> None:
        """Write to ``directory`` (None: nowhere; the report then knows this rank only) and watch from now on.

        Args:
            hang_timeout: how long nothing may move before the process is ended; ten times that in a long phase, such as
                the one at the start.
        """
        self._rank, self._size, self._hang_seconds = rank, size, hang_timeout
        if directory is not None:
            self._file = _file_of(directory, rank)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file.unlink(missing_ok=True)  # of a job before
            except OSError as error:
                print(f"megatron_qad: ERROR: heartbeats in {directory}: {error}. The job goes on", flush=True)
        self._every = min(_MAX_SECONDS_BETWEEN, hang_timeout / 40)
        self._started = self._time = time.time()
        threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()

    def stop(self) -> None:
        """Nothing is written or watched any more."""
        self._has_ended.set()

    def _watch(self) -> None:
        written, seen = None, self._passes()
        while not self._has_ended.is_set():
            if (passes := self._passes()) != seen:
                seen, self._time = passes, time.time()
            place = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "step": self.step}
            place |= {"phase": self.phase, "num_phases": self._num_phases, "time": self._time}
            if self._file is not None and place != written:
                try:
                    aside = self._file.with_suffix(".new")
                    aside.write_text(json.dumps(place))
                    aside.replace(self._file)
                    written = place
                except OSError:
                    pass  # a full disk must not end a job; the next round tries again
            limit = self._hang_seconds * self._patience  # before the time, as it is set after it
            if (waited := time.time() - self._time) > limit:
                self._report(place, waited, limit)
            self._has_ended.wait(self._every)

    def _report(self, mine: dict, waited: float, limit: float) -> None:
        places = self._places() | {mine["rank"]: mine}
        ahead = max(place["num_phases"] for place in places.values())
        speaker = min(rank for rank, place in places.items() if place["num_phases"] == ahead)
        if mine["rank"] != speaker and waited < limit + _GRACE_SECONDS:
            return  # one voice is enough; it ends the job
        order = sorted(places.values(), key=lambda place: (place["num_phases"], place["time"]))
        said = "; ".join(
            f"rank {p['rank']} on {p['host']} in step {p['step']}, {p['phase']}, {time.time() - p['time']:.0f} s ago"
            for p in order[:_MAX_NAMED]
        )
        behind = "furthest behind first" if order[0]["num_phases"] < ahead else "all in one phase, longest silent first"
        print(
            f"error: no progress for {waited:.0f} s. Last seen, {behind}: {said}"
            f"{f'; and {len(order) - _MAX_NAMED} more' if len(order) > _MAX_NAMED else ''}. "
            f"Look at rank {order[0]['rank']}: its process (pid {order[0]['pid']}), its device, its network",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _places(self) -> dict[int, dict]:
        found = {}
        for rank in range(self._size) if self._file is not None else ():
            try:
                found[rank] = json.loads(_file_of(self._file.parent, rank).read_text())
            except (OSError, ValueError):
                found[rank] = {"rank": rank, "host": "an unknown host", "pid": "unknown", "step": 0}
                found[rank] |= {"phase": "never seen", "num_phases": -1, "time": self._started}
        return found


def _file_of(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"
