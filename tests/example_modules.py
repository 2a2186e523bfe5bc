"""Lets tests import the modules of an example and forget them, because several examples use the same module names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@contextmanager
def imports_of_examples(*directories: str) -> Iterator[None]:
    """Make modules of ``examples/DIRECTORY`` importable, and restore sys.path and sys.modules afterwards.

    Modules that were imported from examples before are hidden within the context.
    """
    path, before = list(sys.path), _loaded()
    _forget(before)
    sys.path[:0] = [str(EXAMPLES / directory) for directory in directories]
    try:
        yield
    finally:
        sys.path[:] = path
        _forget(_loaded())
        sys.modules.update(before)


def _loaded() -> dict:
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {name: sys.modules[name] for name, file in files.items() if file and EXAMPLES in Path(file).parents}


def _forget(modules: dict) -> None:
    for name in modules:
        del sys.modules[name]
