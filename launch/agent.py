"""torchrun, whose rendezvous listens on one network interface only.

torchrun's stores listen on every address of a host and ask nobody who he is. With ``QAD_INTERFACE`` set, the socket is
bound to that interface's address before it is handed to the store, for the rendezvous and for the workers' store, which
torchrun opens itself in this process. Without it, this is torchrun.
"""

import fcntl
import os
import socket
import struct
import sys

import torch.distributed

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


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
    store = torch.distributed.TCPStore

    class BoundTCPStore(store):
        def __init__(self, host_name, port, *args, is_master=False, **kwargs):
            if is_master:
                listening = socket.create_server((address, port))
                host_name, port = listening.getsockname()
                kwargs["master_listen_fd"] = listening.detach()
            super().__init__(host_name, port, *args, is_master=is_master, **kwargs)

    torch.distributed.TCPStore = BoundTCPStore


def main() -> None:
    arguments = sys.argv[1:]
    if interface := os.environ.get("QAD_INTERFACE"):
        address = address_of(interface)
        bind_stores_to(address)
        arguments = ["--local-addr", address, *arguments]
    from torch.distributed import run  # after the stores: its modules keep the class that they find

    run.main(arguments)


if __name__ == "__main__":
    main()
