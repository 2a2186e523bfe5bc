"""These tests need Transformer Engine and no GPU: they compare what is built and stored, and compute nothing."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "dist"))  # launch, layout, tiny_models


def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    if mine and (missing := _missing()):
        for item in mine:
            item.add_marker(
                pytest.mark.skip(reason=f"needs Transformer Engine ({missing}); `make test-te` installs it")
            )


def _missing() -> str | None:
    """What keeps Transformer Engine from being imported; None where nothing does."""
    try:
        import torch  # noqa: F401  brings the CUDA libraries
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, FileNotFoundError) as error:  # the second: its torch extension is not there
        return str(error)
    return None
