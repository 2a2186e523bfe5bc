"""Lock files that allow one writer for each output and record which process holds the lock.

On one machine, a lock is stale when its process is gone. On a shared file system the pid of another host means nothing,
so the holder touches its lock every few seconds, and a lock that stays untouched is stale. Both times are taken from
the file server, so the hosts' clocks need not agree. Not supported: protection from processes that do not use locks.
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
from megatron_qad.engine.text_files import parse_json

NAME = "qad.lock"
"""File name of the lock inside a directory that one job owns."""
SECONDS_BETWEEN_BEATS = 10
SECONDS_UNTIL_STALE = 120
"""Time without a beat after which the lock of another machine is stale."""

_KEYS = {"pid", "host", "command", "started"}
"""What each lock says about its holder."""

_held: dict[Path, "_Lock"] = {}


def lock_directory(directory: str | Path, flag: str) -> None:
    """Lock ``directory`` for this process until it ends. Creates the directory; a second call does nothing.

    Args:
        flag: the flag that named the directory, for messages.

    Raises:
        QADError: another process, which the message names, holds the lock, or the directory cannot be written.

    Example::

        from megatron_qad.engine.run_directory import locks
        locks.lock_directory("runs/qad", "--save")
        assert Path("runs/qad/qad.lock").is_file()
    """
    file = Path(directory).resolve() / NAME
    held = _held.get(file)
    if held is None or held.pid != os.getpid():  # a fork inherits the entry but not the lock
        _Lock(file, f"{flag} {directory}").take()


@contextmanager
def lock_output(output: str | Path, flag: str = "--output") -> Iterator[None]:
    """Lock ``output``, a file, prefix or directory that is about to be written, inside the ``with`` block.

    The lock is a hidden file next to it, because an output that appears by a rename must not exist before.

    Raises:
        QADError: as in ``lock_directory``.
    """
    output = Path(os.path.abspath(output))
    lock = _Lock(output.parent / f".{output.name}.lock", f"{flag} {output}")
    lock.take()
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, file: Path, description: str):
        self.file, self.description = file, description
        self._ours = _this_process()
        self.pid = os.getpid()

    def take(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_stale_lock()
        except OSError as error:
            raise QADError(
                f"{self.description}: cannot be written ({error.strerror or error}: {error.filename or self.file}). "
                "Choose another place or make it writable."
            ) from error
        _held[self.file] = self
        atexit.register(self.release)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"lock {self.file.name}").start()

    def release(self) -> None:
        """Release the lock. Does nothing in a fork of the holder, or when it was released before."""
        if _held.get(self.file) is not self or self.pid != os.getpid():
            return
        del _held[self.file]
        self._ended.set()
        if _read(self.file) == self._ours:
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the lock file; False if it exists already."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(self._ours).encode())
        except OSError:  # a full disk
            self.file.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _remove_stale_lock(self) -> None:
        """Remove the existing lock if it is stale.

        Raises:
            QADError: a process holds it.
        """
        if self.file.is_symlink() or (self.file.exists() and not self.file.is_file()):
            raise QADError(
                f"{self.description}: its lock file {self.file} is a link or another special file, which no process of "
                "megatron_qad creates. Remove it."
            )
        holder = _read(self.file)
        if holder is None:
            return
        if holder.get("machine") == self._ours["machine"]:
            if _is_running(holder):
                raise self._in_use_error(holder)
        else:
            self._wait_until_stale(holder)
        # Renamed first: another process that found the same stale lock may have replaced it with its own since then.
        aside = self.file.with_name(f"{self.file.name}.{secrets.token_hex(4)}")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) == holder:
            aside.unlink()
        else:
            aside.rename(self.file)

    def _wait_until_stale(self, holder: dict) -> None:
        """Wait until the lock of another machine has been untouched for ``SECONDS_UNTIL_STALE``.

        Raises:
            QADError: the holder touched it while this process waited.
        """
        last_age, is_reported = 0.0, False
        while (age := self._age()) is not None and age < SECONDS_UNTIL_STALE:
            if age < last_age:
                raise self._in_use_error(holder)
            last_age = age
            if not is_reported:
                print(
                    f"megatron_qad: {self.description} was in use by {_describe(holder)}, last seen {age:.0f} s ago; "
                    f"waiting up to {SECONDS_UNTIL_STALE - age:.0f} s to see whether it still is",
                    flush=True,
                )
                is_reported = True
            time.sleep(1)

    def _age(self) -> float | None:
        """Return the seconds since the lock was touched, by the clock of its file system; None if it is gone."""
        probe = self.file.with_name(f"{self.file.name}.{secrets.token_hex(4)}")
        try:
            with open(probe, "xb") as now, open(self.file, "rb") as lock:  # opened: NFS then asks its server
                return os.fstat(now.fileno()).st_mtime - os.fstat(lock.fileno()).st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _in_use_error(self, holder: dict) -> QADError:
        return QADError(
            f"{self.description}: is in use by {_describe(holder)}. Wait until it ends, stop it, or choose another "
            f"place. The lock file is {self.file}."
        )

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                os.utime(self.file)
                holder = _read(self.file)
                if holder is None:
                    self._create()
                elif holder != self._ours and not self._ended.is_set():
                    print(
                        f"error: {self.description}: {_describe(holder)} has taken over the lock, because this process "
                        f"did not touch it for more than {SECONDS_UNTIL_STALE} s. This process ends, so that only one "
                        "writes. Start it again with another place if you need both.",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
            except FileNotFoundError:
                self._create_again()
            except OSError:
                pass  # the file server does not answer for a while; the next beat tries again

    def _create_again(self) -> None:
        """Create the lock again after someone removed it by hand."""
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
    """Identify the scope in which a pid is unique: one boot of a kernel and one pid namespace (one per container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_ticks(pid: int) -> int | None:
    """Return when a process of this machine started, which tells reused pids apart; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError, ValueError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_running(holder: dict) -> bool:
    return holder.get("start_ticks") is not None and _start_ticks(holder["pid"]) == holder["start_ticks"]


def _read(file: Path) -> dict | None:
    """Return the content of the lock; empty if it is being written or damaged, None if there is no lock."""
    try:
        content = parse_json(file.read_bytes(), str(file), advice="")
    except FileNotFoundError:
        return None
    except QADError:
        return {}
    return content if isinstance(content, dict) and content.keys() >= _KEYS else {}


def _describe(holder: dict) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {holder['host']} ({holder['command']}), started {holder['started']}"
