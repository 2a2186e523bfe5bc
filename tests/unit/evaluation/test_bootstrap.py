"""Bootstrap intervals: their width, their coverage, and what pairing does to them."""

import numpy as np
import pytest

from megatron_qad.evaluation.bootstrap import RowBootstrap


def test_interval_covers_the_mean_as_often_as_it_says():
    """200 texts of 40 rows, whose tokens share their row's value. Drawing tokens would cover it half as often."""
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(40), 8)
    covered = 0
    for _ in range(200):
        values = rng.normal(size=40)[row] + 0.1 * rng.normal(size=320)
        interval = RowBootstrap(row, 400).mean(values)
        assert interval.value == pytest.approx(values.mean())
        covered += interval.low < 0 < interval.high
    assert 0.88 < covered / 200 < 0.99  # 0.95, less some for 40 rows; the standard error is 0.015


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(40), 8)
    first = rng.exponential(size=40)[row] * rng.random(320)
    second = 0.9 * first
    bootstrap = RowBootstrap(row)
    alone, difference = bootstrap.mean(first), bootstrap.difference(second, first)
    assert difference.excludes_zero and difference.value == pytest.approx(-0.1 * alone.value)
    assert difference.high - difference.low == pytest.approx(0.1 * (alone.high - alone.low))
    ratio = bootstrap.ratio(second, first)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.9, 0.9, 0.9))


def test_rows_of_different_lengths_are_weighted_by_their_tokens():
    bootstrap = RowBootstrap(np.array([3, 3, 3, 7]))  # rows without counted tokens are left out
    interval = bootstrap.mean(np.array([1.0, 1.0, 1.0, 5.0]))
    assert (bootstrap.num_rows, interval.value) == (2, 2.0)
    assert (interval.low, interval.high) == (1.0, 5.0)  # both rows may be drawn twice


def test_same_draws_each_time():
    row, values = np.repeat(np.arange(10), 3), np.arange(30.0)
    assert RowBootstrap(row).mean(values) == RowBootstrap(row).mean(values)


def test_one_row_has_no_interval_and_zero_baseline_no_ratio():
    one = RowBootstrap(np.zeros(4, np.int32)).mean(np.arange(4.0))
    assert (one.value, one.low, one.excludes_zero) == (1.5, None, False)
    assert RowBootstrap(np.arange(4)).ratio(np.ones(4), np.zeros(4)) is None
