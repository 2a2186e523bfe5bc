"""One set of models for all tests of this folder that look at conversion and logits."""

import pytest
from made_models import Made, make_models


@pytest.fixture(scope="session")
def made(tmp_path_factory, server) -> Made:
    return make_models(tmp_path_factory.mktemp("models"), server)
