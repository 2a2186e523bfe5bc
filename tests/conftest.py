"""What the folders share."""

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs jobs of several ranks without their ten seconds of imports (tests/dist/fork_server.py)."""
    from fork_server import ForkServer

    with ForkServer(tmp_path_factory.mktemp("server")) as server:
        yield server
