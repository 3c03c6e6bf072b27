from __future__ import annotations

import numpy as np
import pytest

from mvrec_core.diversity import pick


def by_definition(score, vectors, k, diversity, caps=()):
    """The greedy choice written out, one candidate and one pair at a time."""
    z = [(s - np.mean(score)) / np.std(score) if np.std(score) else 0.0 for s in score]
    chosen: list[int] = []
    while len(chosen) < k:
        values = {}
        for j in range(len(score)):
            fits = all(
                sum(value in of[i] for i in chosen) < most for of, most in caps for value in set(of[j].tolist()) - {0}
            )
            if j not in chosen and fits:
                values[j] = (1 - diversity) * z[j] - diversity * max(
                    (float(vectors[i] @ vectors[j]) for i in chosen), default=0.0
                )
        if not values:
            break
        chosen.append(max(values, key=lambda j: (values[j], -j)))
    return chosen


def draw(seed, count=30, dim=5):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, dim))
    return rng, np.sort(rng.normal(size=count))[::-1], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed, diversity):
    rng, score, vectors = draw(seed)
    caps = [(rng.integers(0, 6, (30, 2)), 2), (rng.integers(0, 4, (30, 1)), 4)]
    for limits in ([], caps[:1], caps):
        expected = by_definition(score, vectors, 12, diversity, limits)
        assert pick(score, vectors, 12, diversity, limits).tolist() == expected


def test_without_diversity_it_is_the_order_of_the_scores():
    _, score, vectors = draw(0)
    assert pick(score, vectors, 40, 0.0).tolist() == list(range(30))


def test_a_double_waits_for_what_is_unlike():
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert pick(np.array([1.0, 0.9, 0.8]), vectors, 3, 0.8).tolist() == [0, 2, 1]


def test_an_item_counts_for_each_of_its_values_and_one_without_values_for_none():
    values = np.array([[1, 2], [1, 0], [2, 2], [0, 0], [0, 0], [3, 3]])
    assert pick(np.arange(6.0)[::-1], np.zeros((6, 1)), 6, 0.0, [(values, 1)]).tolist() == [0, 3, 4, 5]


def test_equal_scores_and_no_candidates():
    assert pick(np.ones(3), np.eye(3), 2, 0.5).tolist() == [0, 1]
    assert pick(np.zeros(0), np.zeros((0, 3)), 2, 0.5).tolist() == []
