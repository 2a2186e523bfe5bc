"""Models that the tests of conversion and logits share."""

import pytest
from made_models import Made, make_models


@pytest.fixture(scope="session")
def made(tmp_path_factory, server) -> Made:
    return make_models(tmp_path_factory.mktemp("models"), server)
