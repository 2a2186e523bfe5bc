"""Skip the tests of this folder without Transformer Engine. They compare built and saved models and need no GPU."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "dist"))  # launch, layout, tiny_models


def pytest_collection_modifyitems(items):
    te_items = [item for item in items if HERE in item.path.parents]
    if te_items and (error := _import_error()):
        for item in te_items:
            item.add_marker(pytest.mark.skip(reason=f"needs Transformer Engine ({error}); `make test-te` installs it"))


def _import_error() -> str | None:
    """Return the error of importing Transformer Engine, or None if it imports."""
    try:
        import torch  # noqa: F401  loads the CUDA libraries
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, FileNotFoundError) as error:  # FileNotFoundError: its torch extension is missing
        return str(error)
    return None
