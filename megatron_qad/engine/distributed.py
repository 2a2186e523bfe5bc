"""Process groups for tools that run alone as well as under torchrun."""

import errno
import os
import socket
from collections.abc import Mapping

import torch

from megatron_qad.engine.errors import QADError


def init_process_group() -> None:
    """Join torchrun's process group, or create a group of this process alone. gloo is enough: tools only move files."""
    if torch.distributed.is_initialized():
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_port_is_free(environ: Mapping[str, str]) -> None:
    """Check on the first rank that ``MASTER_PORT``, on which it will wait for the others, is free.

    Under torchrun the agent holds the port, and the ranks are its clients.

    Raises:
        QADError: another process uses the port.
    """
    if environ.get("RANK") != "0" or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = environ["MASTER_PORT"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", int(port)))
        except OverflowError as error:
            raise QADError(f"MASTER_PORT={port}: expected a number up to 65535.") from error
        except OSError as error:
            problem = "is in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise QADError(
                f"MASTER_PORT={port}: {problem}. Choose another port (torchrun --master-port), or end that process."
            ) from error
