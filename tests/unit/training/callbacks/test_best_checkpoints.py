"""The ranking of checkpoints by their validation KL, in one process."""

import math

import pytest

from megatron_qad.engine import init_runtime

init_runtime()

from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.run_directory import json_records  # noqa: E402
from megatron_qad.engine.run_directory.iterations import validated_kl  # noqa: E402
from megatron_qad.engine.run_directory.run_files import BEST_FILE  # noqa: E402
from megatron_qad.training.callbacks.best_checkpoints import BestCheckpoints  # noqa: E402


@pytest.fixture
def started(tmp_path):
    """``started(iteration)`` returns the ranking in tmp_path of a job that starts at that iteration."""

    def start(iteration=0):
        init_process_group()
        best = BestCheckpoints(None)
        best.start(tmp_path, iteration)
        return best

    return start


def entries(tmp_path) -> list[dict]:
    return json_records.read(tmp_path / BEST_FILE)


def test_nan_is_ranked_last(started, tmp_path):
    best = started()
    for iteration, kl in ((100, math.nan), (200, 0.3), (300, 0.1), (400, math.inf)):
        best.add(iteration, kl, (64, "a"))
    assert best.ranked([100, 200, 300, 400]) == [300, 200, 100, 400]
    assert entries(tmp_path)[0] == {"iteration": 300, "kl_to_teacher": 0.1, "num_tokens": 64, "tokens_sha256": "a"}
    assert list(validated_kl(tmp_path)) == [300, 200, 100, 400]


def test_validation_without_counted_tokens_is_ignored(started, tmp_path):
    best = started()
    best.add(100, math.nan, (0, "a"))
    assert best.ranked([100]) == [] and not (tmp_path / BEST_FILE).exists()


def test_validations_on_different_tokens_are_not_compared(started, tmp_path, capsys):
    best = started()
    best.add(100, 0.1, (64, "a"))
    best.add(200, 0.2, (64, "a"))
    assert "no longer ranked" not in capsys.readouterr().out
    best = started(200)  # the resumed job reads a longer prefix
    assert best.ranked([100, 200]) == [100, 200]
    best.add(300, 0.3, (128, "a"))
    best.add(400, 0.25, (128, "a"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no longer ranked" in line]
    assert "iteration 300 was validated on 128 tokens, 100, 200 on 64" in line
    assert best.ranked([100, 200, 300, 400]) == [400, 300]
    assert [(entry["iteration"], entry["num_tokens"]) for entry in entries(tmp_path)] == [(400, 128), (300, 128)]


def test_new_validation_of_an_iteration_on_other_tokens_replaces_the_old(started, tmp_path):
    started().add(100, 0.1, (64, "a"))
    started(100).add(100, 0.3, (128, "a"))
    assert entries(tmp_path) == [{"iteration": 100, "kl_to_teacher": 0.3, "num_tokens": 128, "tokens_sha256": "a"}]


def test_validations_on_equally_many_other_tokens_are_not_compared(started, tmp_path, capsys):
    started().add(100, 0.1, (64, "a"))
    best = started(100)
    best.add(200, 0.2, (64, "a"))
    assert best.ranked([100, 200]) == [100, 200]
    best.add(300, 0.3, (64, "b"))
    assert "iteration 300 was validated on 64 tokens, 100, 200 on 64 others." in capsys.readouterr().out
    assert best.ranked([100, 200, 300]) == [300]
    assert [entry["tokens_sha256"] for entry in entries(tmp_path)] == ["b"]


def test_entries_of_older_versions_have_no_token_count(started, tmp_path, capsys):
    json_records.write(tmp_path / BEST_FILE, [{"iteration": 100, "kl_to_teacher": 0.1}])
    best = started(100)
    assert best.ranked([100]) == [100]
    best.add(200, 0.2, (64, "a"))
    assert best.ranked([100, 200]) == [200] and "100 on an unknown number of" in capsys.readouterr().out


def test_entries_of_older_versions_have_no_hash(started, tmp_path, capsys):
    json_records.write(tmp_path / BEST_FILE, [{"iteration": 100, "kl_to_teacher": 0.1, "num_tokens": 64}])
    best = started(100)
    best.add(200, 0.2, (64, "a"))
    assert best.ranked([100, 200]) == [200] and "100 on unknown tokens." in capsys.readouterr().out
