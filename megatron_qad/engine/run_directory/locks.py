"""One writer for each output: a lock file that says which process holds it.

On one machine, a lock is stale when its process is gone. On a shared file system the pid of another host says nothing,
so the holder touches its lock every few seconds, and a lock that stays untouched is stale. Both times are the file
server's own, so that hosts' clocks need not agree. Left out: protection from processes that do not ask.
"""

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_qad.engine.errors import QADError

NAME = "qad.lock"
"""Of the lock inside a directory that one job owns."""
SECONDS_BETWEEN_BEATS = 10
SECONDS_UNTIL_STALE = 120
"""Without a beat, for a holder on another machine."""

_held: dict[Path, "_Lock"] = {}


def lock_directory(directory: str | Path, flag: str) -> None:
    """Own ``directory`` (made if need be) until this process ends. A process that owns it already goes on.

    Args:
        flag: what named the directory, for messages.

    Raises:
        QADError: another process owns it (named), or it cannot be written.
    """
    file = Path(directory).resolve() / NAME
    held = _held.get(file)
    if held is None or held.pid != os.getpid():  # not what this process was forked from
        _Lock(file, f"{flag} {directory}").take()


@contextmanager
def lock_output(output: str | Path, flag: str = "--output") -> Iterator[None]:
    """Own ``output``, a file, prefix or directory that is about to be written, inside the ``with``.

    The lock is a hidden file beside it, because an output that appears by a rename must not be there before.

    Raises:
        QADError: as ``lock_directory``.
    """
    output = Path(os.path.abspath(output))
    lock = _Lock(output.parent / f".{output.name}.lock", f"{flag} {output}")
    lock.take()
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, file: Path, what: str):
        self.file, self.what = file, what
        self._mine = _this_process()
        self.pid = os.getpid()

    def take(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._make_way()
        except OSError as error:
            raise QADError(
                f"{self.what}: cannot be written ({error.strerror or error}: {error.filename or self.file}). Choose "
                "another place or make it writable"
            ) from error
        _held[self.file] = self
        atexit.register(self.release)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"lock {self.file.name}").start()

    def release(self) -> None:
        """Give it back. Nothing happens in a process that was forked from the holder, or a second time."""
        if _held.get(self.file) is not self or self.pid != os.getpid():
            return
        del _held[self.file]
        self._ended.set()
        if _read(self.file) == self._mine:
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the file is this process's now."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(self._mine).encode())
        except OSError:  # a full disk
            self.file.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _make_way(self) -> None:
        """Return when the lock that is there has been removed.

        Raises:
            QADError: it is held.
        """
        holder = _read(self.file)
        if holder is None:
            return
        if holder.get("machine") == self._mine["machine"]:
            if _runs(holder):
                raise self._refusal(holder)
        else:
            self._watch(holder)
        # Renamed first: another process that found the same stale lock may have put its own in its place since.
        aside = self.file.with_name(f"{self.file.name}.{secrets.token_hex(4)}")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) == holder:
            aside.unlink()
        else:
            aside.rename(self.file)

    def _watch(self, holder: dict) -> None:
        """Wait until the lock of another machine has been silent for long enough.

        Raises:
            QADError: it was touched meanwhile.
        """
        seen, said = 0.0, False
        while (silence := self._silence()) is not None and silence < SECONDS_UNTIL_STALE:
            if silence < seen:
                raise self._refusal(holder)
            seen = silence
            if not said:
                print(
                    f"megatron_qad: {self.what} was in use by {_described(holder)}, last seen {silence:.0f} s ago; "
                    f"waiting up to {SECONDS_UNTIL_STALE - silence:.0f} s to see whether it still is",
                    flush=True,
                )
                said = True
            time.sleep(1)

    def _silence(self) -> float | None:
        """Seconds since the lock was touched, by the clock of its file system; None if it is gone."""
        probe = self.file.with_name(f"{self.file.name}.{secrets.token_hex(4)}")
        try:
            with open(probe, "wb") as now, open(self.file, "rb") as lock:  # opened: NFS then asks its server
                return os.fstat(now.fileno()).st_mtime - os.fstat(lock.fileno()).st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: dict) -> QADError:
        return QADError(
            f"{self.what}: is in use by {_described(holder)}. Wait for it, end it, or choose another place "
            f"(the lock is {self.file})"
        )

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                os.utime(self.file)
                found = _read(self.file)
                if found is None:
                    self._create()
                elif found != self._mine and not self._ended.is_set():
                    print(
                        f"error: {self.what}: {_described(found)} has taken it over, because this process was silent "
                        f"for more than {SECONDS_UNTIL_STALE} s. It ends here, so that two do not write",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
            except FileNotFoundError:
                self._create_again()
            except OSError:
                pass  # a file server that does not answer for a while; the next beat tries again

    def _create_again(self) -> None:
        """Somebody removed the lock by hand."""
        try:
            self._create()
        except OSError:
            pass  # the directory is gone, or the disk is full: the next beat tries again


def _this_process() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join(sys.argv)[:200],
        "machine": _machine(),
        "start_ticks": _start_ticks(os.getpid()),
    }


def _machine() -> str:
    """Where pids mean the same: one boot of one kernel, one namespace of pids (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started, which no later process of the same pid has; None: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _runs(holder: dict) -> bool:
    return holder.get("start_ticks") is not None and _start_ticks(holder["pid"]) == holder["start_ticks"]


def _read(file: Path) -> dict | None:
    """What the lock says; empty if it is being written or damaged, None if there is none."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {holder['host']} ({holder['command']}), started {holder['started']}"
