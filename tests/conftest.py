"""Shared by all tests: the fork server, and how test files are distributed to the processes of pytest-xdist."""

from pathlib import Path

import pytest
import serving_table

HERE = Path(__file__).parent
# Scheduling order: the longest files first, short ones last to fill the gaps.
SCHEDULING_ORDER = (
    "dist/test_axes.py",
    "serve",
    "slurm",
    "dist/test_checkpoints.py",
    "dist/test_hybrid",
    "dist",
    "e2e",
    "gpu",
    "unit",
)
# Files that share an expensive session fixture: the Slurm cluster with its reference job, the students of
# tests/serve/conftest.py, and the models of tests/dist/conftest.py.
SHARED_FIXTURES = {
    "slurm": "slurm/",
    "serve": "serve/",
    "models": ("dist/test_conversion.py", "dist/test_model_parity.py"),
}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Server that runs multi-rank jobs without repeating ten seconds of imports (tests/dist/fork_server.py)."""
    from fork_server import ForkServer

    with ForkServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _position(item.path.relative_to(HERE).as_posix()))


def _position(file: str) -> int:
    return next((i for i, start in enumerate(SCHEDULING_ORDER) if file.startswith(start)), len(SCHEDULING_ORDER))


def pytest_terminal_summary(terminalreporter):
    serving_table.report(terminalreporter)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run each file in one process, and files that share a session fixture in the same process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            path = file.removeprefix("tests/")
            return next((name for name, starts in SHARED_FIXTURES.items() if path.startswith(starts)), file)

    config.option.loadscopereorder = False  # keep our order instead of ordering by the number of tests
    return Scheduling(config, log)
