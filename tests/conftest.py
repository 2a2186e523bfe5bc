"""What the folders share: the fork server, and which process of pytest-xdist runs what (``make test`` has two)."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# In the order in which they are given out: what takes longest first, small files last, which fill the gaps.
LONGEST = ("dist/test_axes.py", "slurm", "dist/test_checkpoints.py", "dist/test_hybrid", "dist", "e2e", "gpu", "unit")
# Session fixtures that take long to make: the cluster and its undisturbed job; the models of tests/dist/conftest.py.
TOGETHER = {"slurm": "slurm/", "models": ("dist/test_conversion.py", "dist/test_model_parity.py")}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs jobs of several ranks without their ten seconds of imports (tests/dist/fork_server.py)."""
    from fork_server import ForkServer

    with ForkServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _rank(item.path.relative_to(HERE).as_posix()))


def _rank(file: str) -> int:
    return next((i for i, start in enumerate(LONGEST) if file.startswith(start)), len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is run by one process, and the files that share a session's fixtures by the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            within = file.removeprefix("tests/")
            return next((name for name, starts in TOGETHER.items() if within.startswith(starts)), file)

    config.option.loadscopereorder = False  # not by the number of tests
    return Scheduling(config, log)
