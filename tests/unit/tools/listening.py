"""A program for launch/torchrun.sh or python: rank 0 prints the addresses on which the processes of the job listen."""

import os
import socket
import struct
import sys

import torch

from megatron_qad.engine.distributed import init_process_group, rank_and_size


def listening(pids: list[int]) -> set[str]:
    """Return the local addresses of the listening TCP sockets of some processes."""
    links = [f"/proc/{pid}/fd/{fd}" for pid in pids for fd in os.listdir(f"/proc/{pid}/fd")]
    sockets = {os.readlink(link) for link in links if os.path.lexists(link)}
    addresses = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with open(f"/proc/net/{table}") as lines:
            for fields in map(str.split, list(lines)[1:]):
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    address = bytes.fromhex(fields[1].split(":")[0])
                    words = struct.unpack(f">{len(address) // 4}I", address)  # each in the byte order of the host
                    addresses.add(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return addresses


init_process_group()
rank, size = rank_and_size()
torch.distributed.all_reduce(torch.ones(1))  # opens the connections between ranks
pids: list = [None] * size
torch.distributed.all_gather_object(pids, os.getpid())
agent = [os.getppid()] if size > 1 else []
found = [sorted(listening([process])) for process in (*pids, *agent)]
torch.distributed.barrier()
torch.distributed.destroy_process_group()
if rank == 0:
    sys.exit(f"listening: {found}")
