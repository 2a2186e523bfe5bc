"""Killed jobs and exports end like uninterrupted ones; ``make test-kill`` makes thirty kills for docs/kill_test.md."""

from kill_harness import Harness


def test_killed_jobs_end_like_uninterrupted_ones(tmp_path, server):
    harness = Harness(tmp_path, server, seed=7)
    harness.exports(1)
    harness.one_run("killed", 4)
    for kill in harness.kills:
        print(kill)
    assert len(harness.kills) >= 4
