"""What ``make test``'s two processes share out: one file's tests stay together, so that its fixtures are made once."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "slurm" in item.path.parts:
            group = "slurm"  # one cluster a machine
        elif "made" in getattr(item, "fixturenames", ()):
            group = "made"  # one set of models (tests/dist/conftest.py)
        else:
            group = str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
