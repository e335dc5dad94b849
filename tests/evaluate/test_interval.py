"""Intervals against theory: independent draws, correlated draws, window borders."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits.evaluate import interval


def test_independent_draws_give_the_normal_interval() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 20 * 2047)
    low, high = interval.mean_interval(x, interval.blocks(20, 2047))
    half = 1.96 * 2.0 / np.sqrt(len(x))
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)
    assert low < 3.0 < high


def test_correlated_draws_give_a_wider_one() -> None:
    """AR(1) with coefficient 0.9 has a variance of the mean that is (1 + 0.9) / (1 - 0.9) = 19 times larger."""
    rng = np.random.default_rng(1)
    x = np.zeros(20 * 2047)
    for i in range(1, len(x)):
        x[i] = 0.9 * x[i - 1] + rng.normal()
    low, high = interval.mean_interval(x, interval.blocks(20, 2047))
    independent = 2 * 1.96 * x.std() / np.sqrt(len(x))
    assert (high - low) / independent == pytest.approx(np.sqrt(19), rel=0.3)


def test_quantile_interval() -> None:
    x = np.random.default_rng(2).exponential(1.0, 10 * 1023)
    low, high = interval.quantile_interval(x, interval.blocks(10, 1023), 0.99)
    assert low < -np.log(0.01) < high
    assert low <= np.quantile(x, 0.99) <= high
    # Asymptotic standard error of a quantile: sqrt(q (1 - q) / n) / density.
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.99 * 0.01 / len(x)) / 0.01, rel=0.35)


def test_blocks_do_not_cross_windows() -> None:
    block = interval.blocks(3, 2047).reshape(3, 2047)
    assert all(set(block[i]).isdisjoint(block[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert np.bincount(block.reshape(-1)).max() == interval.BLOCK
    assert np.array_equal(np.unique(block), np.arange(block.max() + 1))


@pytest.mark.parametrize(("windows", "per_window"), [(1, 1), (1, 7), (2, 31), (1, 2047)])
def test_small_samples_keep_many_blocks(windows: int, per_window: int) -> None:
    block = interval.blocks(windows, per_window)
    assert len(block) == windows * per_window
    assert block[-1] + 1 >= min(windows * per_window, interval.LEAST)
    x = np.full(len(block), 2.5)
    assert interval.mean_interval(x, block) == (2.5, 2.5)


def test_same_seed_same_interval() -> None:
    x = np.random.default_rng(3).normal(size=500)
    block = interval.blocks(5, 100)
    assert interval.mean_interval(x, block) == interval.mean_interval(x, block)
