"""The list of the best checkpoints, in one process."""

import math

from megatron_qad.runtime import prepare

prepare()

from megatron_qad.config.run_files import BEST_FILE  # noqa: E402
from megatron_qad.models.weights import validated_kl  # noqa: E402
from megatron_qad.runtime import json_records  # noqa: E402
from megatron_qad.runtime.distributed import init_process_group  # noqa: E402
from megatron_qad.training.best import BestCheckpoints  # noqa: E402


def test_a_validation_that_is_not_a_number_is_the_worst(tmp_path):
    init_process_group()
    best = BestCheckpoints()
    best.start(tmp_path, 0)
    for iteration, kl in ((100, math.nan), (200, 0.3), (300, 0.1), (400, math.inf)):
        best.add(iteration, kl)
    assert best.ranked([100, 200, 300, 400]) == [300, 200, 100, 400]
    assert json_records.read(tmp_path / BEST_FILE)[0]["iteration"] == 300
    assert list(validated_kl(tmp_path)) == [300, 200, 100, 400]
