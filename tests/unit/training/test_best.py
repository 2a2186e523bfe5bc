"""The list of the best checkpoints, in one process."""

import json
import math

import pytest
import torch

from megatron_qad.runtime import prepare

prepare()

from megatron_qad.config.run_files import BEST_FILE  # noqa: E402
from megatron_qad.models.weights import validated_kl  # noqa: E402
from megatron_qad.training.best import BestCheckpoints  # noqa: E402


@pytest.fixture
def one_process(tmp_path):
    if torch.distributed.is_initialized():  # another file's, of one process too
        yield
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_validation_that_is_not_a_number_is_the_worst(one_process, tmp_path):
    best = BestCheckpoints()
    best.start(tmp_path, 0)
    for iteration, kl in ((100, math.nan), (200, 0.3), (300, 0.1), (400, math.inf)):
        best.add(iteration, kl)
    assert best.ranked([100, 200, 300, 400]) == [300, 200, 100, 400]
    assert json.loads((tmp_path / BEST_FILE).read_text())[0]["iteration"] == 300
    assert list(validated_kl(tmp_path)) == [300, 200, 100, 400]
