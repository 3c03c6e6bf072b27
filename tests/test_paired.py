from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mvrec_core.paired import compare


def one(first, second, **how):
    return compare(np.array(first, float)[:, None], np.array(second, float)[:, None], ["HR@10"], **how)["HR@10"]


def test_means_and_their_difference():
    found = one([1, 0, 1, 1], [0, 0, 1, 0])
    assert (found.first, found.second, found.difference) == (0.75, 0.25, 0.5)


def test_the_p_value_is_that_of_every_flip_of_signs():
    rng = np.random.default_rng(2)
    first, second = rng.random(12), rng.random(12) - 0.15
    found = one(first, second, samples=20_000)
    exact = stats.permutation_test(
        (first - second,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert 0.02 < exact.pvalue < 0.98
    assert found.p == pytest.approx(exact.pvalue, abs=0.015)


def test_the_interval_is_that_of_a_public_paired_bootstrap():
    rng = np.random.default_rng(3)
    first, second = rng.random(400), rng.random(400) * 0.9
    found = one(first, second)
    public = stats.bootstrap((first - second,), np.mean, method="percentile", n_resamples=5000, rng=4)
    assert (found.low, found.high) == pytest.approx(tuple(public.confidence_interval), abs=0.003)


def test_pairing_sees_what_two_intervals_would_not():
    rng = np.random.default_rng(4)
    first = (rng.random(500) < 0.3).astype(float)
    second = first.copy()
    second[np.flatnonzero(first)[:12]] = 0  # the same users, but for twelve
    found = one(first, second)
    assert found.low > 0 and found.p < 0.01
    assert found.difference == pytest.approx(12 / 500)


def test_equal_runs_do_not_differ():
    found = one([0.2, 0.4, 0.9], [0.2, 0.4, 0.9])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_no_better_than_chance_is_seldom_significant():
    rng = np.random.default_rng(5)
    p = [one(*rng.random((2, 40)), seed=n, samples=300).p for n in range(200)]
    assert 0.005 < np.mean(np.array(p) < 0.05) < 0.1  # 0.05 of them by definition
    assert np.mean(p) == pytest.approx(0.5, abs=0.08)


def test_it_repeats_and_swaps():
    rng = np.random.default_rng(6)
    first, second = rng.random((2, 50, 3))
    names = ["a", "b", "c"]
    assert compare(first, second, names, seed=1) == compare(first, second, names, seed=1)
    there, back = compare(first, second, names, seed=1)["b"], compare(second, first, names, seed=1)["b"]
    assert (there.difference, there.low, there.high, there.p) == pytest.approx(
        (-back.difference, -back.high, -back.low, back.p)
    )


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3, 1), (3, 1)), ((0, 2), (0, 2))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"expected two \[users, 2\]"):
        compare(np.zeros(shapes[0]), np.zeros(shapes[1]), ["a", "b"])
