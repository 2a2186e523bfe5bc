"""A job on one node listens on the loopback interface only."""

import shutil
import socket
import subprocess
import sys

import pytest
from launch_scripts import ROOT, run

PROGRAM = "tests/unit/tools/listening.py"


@pytest.fixture
def on_the_network() -> list[str]:
    """The start of a command that runs on a host whose name is an address of its network.

    gloo listens on the address of the host's name. Without this, the name may be that of the loopback interface.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        address = any_socket.getsockname()[0]
    command = ["unshare", "--map-root-user", "--uts", "sh", "-c", f'hostname {address} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this user may not change the host name in a namespace")
    return command


def test_ranks_and_their_agent(on_the_network):
    settings = {"NPROC_PER_NODE": "2", "QAD_INTERFACE": "eth0"}  # for several nodes; one node needs no network
    _, text = run(*on_the_network, "launch/torchrun.sh", PROGRAM, **settings)
    assert "listening: [['127.0.0.1'], ['127.0.0.1'], ['127.0.0.1']]" in text, text
    assert "torchrun.sh: rank 0 on " in text and "failed first, with status 1. See its lines above." in text
    assert "Traceback" not in text


def test_tool_without_a_launcher(on_the_network):
    _, text = run(*on_the_network, sys.executable, PROGRAM, PYTHONPATH=str(ROOT))
    assert "listening: [['127.0.0.1']]" in text, text
