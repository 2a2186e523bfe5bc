"""torchrun whose ranks never outlive it, and whose rendezvous listens on one network interface only.

A signal that asks a job to stop (SIGTERM, SIGUSR1) is passed on as the file ``stop`` in ``QAD_JOB_DIR``: torchrun would
give its ranks 30 seconds and kill them in the middle of a save. SIGINT and the death of torchrun.sh end this process at
once, and the kernel ends the ranks with it (``rank.py``). When a rank fails, the others get five seconds.

torchrun's stores listen on every address of a host and do not ask who connects. With ``QAD_INTERFACE`` set, the socket
is bound to that interface's address before it is handed to the store, for the rendezvous and for the workers' store,
which torchrun opens itself in this process.
"""

import contextlib
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
"""For the other ranks to print their own errors. They have nothing to save: a checkpoint needs every rank."""


def handle_signals() -> None:
    """Pass on what asks the job to stop; leave at once when nobody waits for it any more."""
    stop = Path(os.environ["QAD_JOB_DIR"]) / "stop"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.touch())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun.sh says what is lost
    # A thread and no signal: Python runs handlers in the main thread, which waits in C++ for the other nodes.
    threading.Thread(target=end_with_launcher, args=[int(os.environ["QAD_LAUNCHER_PID"])], daemon=True).start()
    os.environ["QAD_AGENT_PID"] = str(os.getpid())


def end_with_launcher(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(0.5)
    with contextlib.suppress(OSError):  # the terminal may be gone, too
        print(
            "torchrun.sh is gone, and all ranks end with it. The steps since the last checkpoint are lost; the same "
            "command goes on from there",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def address_of(interface: str) -> str:
    """IPv4 address of a network interface of this machine; ``ip`` may be missing in a container."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            sys.exit(f"error: QAD_INTERFACE={interface}: {error.strerror}; this machine has {names}")
    return socket.inet_ntoa(answer[20:24])


def bind_stores_to(address: str) -> None:
    """Let every store that this process serves listen on ``address`` alone."""
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
    """Shorten the 30 seconds that torchrun gives the other ranks when one has failed."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=_SECONDS_AFTER_A_FAILURE: close(self, death_sig, timeout)


def main() -> None:
    handle_signals()
    arguments = sys.argv[1:]
    if interface := os.environ.get("QAD_INTERFACE"):
        address = address_of(interface)
        bind_stores_to(address)
        arguments = ["--local-addr", address, *arguments]
    from torch.distributed import run  # after the stores: its modules keep the class that they find

    end_ranks_soon()
    # Its own handlers would replace those above; SIGQUIT is left to it, as the list may not be empty.
    run.main(["--signals-to-handle", "SIGQUIT", "--no-python", *arguments])


if __name__ == "__main__":
    main()
