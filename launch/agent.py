"""Runs torchrun so that its ranks never outlive it, it listens on one network interface only, and an error is one line.

A signal that requests a stop (SIGTERM, SIGUSR1) is passed on as the file ``stop`` in ``QAD_JOB_DIR``, because torchrun
would give its ranks 30 seconds and then kill them in the middle of a save. SIGINT and the death of torchrun.sh end this
process immediately, and the kernel ends the ranks with it (``rank.py``). If a rank fails, the others get five seconds.

torchrun's stores listen on every address of a host, accept every connection, and unpickle what they receive. If
``QAD_INTERFACE`` is set, as environment.sh does for every job on one node, the socket is bound to the address of that
interface before it is passed to the store. This covers the rendezvous and the workers' store, which torchrun opens in
this process.
"""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_SECONDS_AFTER_A_FAILURE = 5
"""Time for the other ranks to print their errors. They have nothing to save: a checkpoint needs every rank."""


def handle_signals() -> None:
    """Pass on stop requests, and end as soon as torchrun.sh has ended."""
    stop = Path(os.environ["QAD_JOB_DIR"]) / "stop"
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda *_: stop.touch())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun.sh reports the lost steps
    # A thread instead of a signal: Python runs handlers in the main thread, which waits in C++ for the other nodes.
    threading.Thread(target=end_with_launcher, args=[int(os.environ["QAD_LAUNCHER_PID"])], daemon=True).start()
    os.environ["QAD_AGENT_PID"] = str(os.getpid())


def end_with_launcher(pid: int) -> None:
    """Poll until torchrun.sh, the parent with this pid, has ended; then end this process."""
    while os.getppid() == pid:
        time.sleep(0.5)
    with contextlib.suppress(OSError):  # the terminal may be gone, too
        print(
            "torchrun.sh has ended, and all ranks end with it. The steps since the last checkpoint are lost; run the "
            "same command again to resume from it.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface. Does not use ``ip``, which may be missing in a container."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            reply = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            sys.exit(f"error: QAD_INTERFACE={interface}: {error.strerror}. This machine has {names}.")
    return socket.inet_ntoa(reply[20:24])


def bind_stores_to(address: str) -> None:
    """Make every store that this process serves listen on ``address`` only."""
    import torch.distributed

    store = torch.distributed.TCPStore

    class BoundTCPStore(store):
        def __init__(self, host_name, port, *args, is_master=False, **kwargs):
            if is_master:
                listening = socket.create_server((address, port))
                host_name, port = listening.getsockname()
                kwargs["master_listen_fd"] = listening.detach()
            super().__init__(host_name, port, *args, is_master=is_master, **kwargs)

    torch.distributed.TCPStore = BoundTCPStore


def end_ranks_soon() -> None:
    """Shorten the 30 seconds that torchrun gives the other ranks after one has failed."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=_SECONDS_AFTER_A_FAILURE: close(self, death_sig, timeout)


def check_resolves(arguments: list[str]) -> None:
    """Exit if the address of node 0 does not exist: torch would repeat the look-up until ``QAD_JOIN_TIMEOUT``."""
    if (endpoint := endpoint_of(arguments)) is None:
        return
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) != socket.EAI_AGAIN:  # a name server that does not answer yet
            sys.exit(f"error: MASTER_ADDR={host}: {error.args[-1]}. Give the host name or address of node 0.")


def endpoint_of(arguments: list[str]) -> str | None:
    """Return HOST:PORT of the rendezvous; None on a single node."""
    flag = "--rdzv-endpoint"
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def describe(error: BaseException, endpoint: str | None) -> str:
    """Return one line on why the job could not start or has failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        how = f"status {failure.exitcode}" if failure.exitcode > 0 else f"signal {-failure.exitcode}"
        host = socket.gethostname()
        return f"torchrun.sh: rank {rank} on {host} (pid {failure.pid}) failed first, with {how}. See its lines above."
    wait = f"within {os.environ.get('QAD_JOIN_TIMEOUT', 900)} s (QAD_JOIN_TIMEOUT)"
    causes = f"{error} {error.__cause__ or ''}"
    if "EADDRINUSE" in causes or getattr(error, "errno", None) == errno.EADDRINUSE:
        return (
            f"error: the rendezvous cannot listen on {endpoint}: another process uses this port. Choose another "
            "MASTER_PORT, the same on all nodes, or end that process."
        )
    if isinstance(error, RendezvousTimeoutError):
        return f"error: not all nodes joined the rendezvous at {endpoint} {wait}. Start the job on every node."
    if isinstance(error, OSError):
        return f"error: the rendezvous at {endpoint or 'the loopback interface'}: {error.strerror or error}."
    reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return (
        f"error: the rendezvous at {endpoint} failed {wait}: {reason}. Check MASTER_ADDR, MASTER_PORT, the firewall, "
        "and that the job runs on every node."
    )


def quiet_stores() -> None:
    """Make torch's C++ code print no stack for each attempt to reach node 0. Called before torch is imported."""
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
        import torch.distributed  # noqa: F401  it reads the variable, which the ranks must not inherit

        del os.environ["TORCH_CPP_LOG_LEVEL"]


def main() -> None:
    handle_signals()
    arguments = sys.argv[1:]
    check_resolves(arguments)
    interface = os.environ.get("QAD_INTERFACE")
    address = address_of(interface) if interface else None
    quiet_stores()
    if address is not None:
        bind_stores_to(address)
        arguments = ["--local-addr", address, *arguments]
    from torch.distributed import DistError, run  # after bind_stores_to: its modules import the class by name
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    end_ranks_soon()
    try:
        # torchrun's handlers would replace those above. It handles only SIGQUIT, because the list must not be empty.
        run.main(["--signals-to-handle", "SIGQUIT", "--no-python", *arguments])
    except (ChildFailedError, RendezvousError, DistError, OSError) as error:
        sys.exit(describe(error, endpoint_of(arguments)))


if __name__ == "__main__":
    main()
