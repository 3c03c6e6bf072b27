from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core.beyond_accuracy import Categories, ListSums, Vectors
from mvrec_core.catalog import FIRST
from mvrec_core.index import NOTHING

ROWS = FIRST + 9


def oracle(lists, histories, train, vectors, categories) -> dict[str, float]:
    """By the definitions, one pair at a time; `categories` are sets."""
    k = len(lists[0])
    shown = [j for row in lists for j in row if j != NOTHING]
    out = {f"coverage@{k}": len(set(shown)) / (ROWS - FIRST)}
    if shown and sum(train):
        out[f"novelty@{k}"] = sum(-math.log2(max(train[j], 1) / sum(train)) for j in shown) / len(shown)
    both = []
    for row, history in zip(lists, histories, strict=True):
        row, history = [j for j in row if j != NOTHING], [j for j in history if j >= FIRST]
        if row and history:
            both.append((np.mean([train[j] for j in row]), np.mean([train[j] for j in history])))
    if sum(taken for _, taken in both):
        out[f"popularity_bias@{k}"] = np.mean([a for a, _ in both]) / np.mean([b for _, b in both])

    def cosine(a, b):
        return 1 - a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)

    def jaccard(a, b):
        return 1 - len(a & b) / len(a | b)

    for name, of, distance in (("text", vectors, cosine), ("genres", categories, jaccard)):
        means = []
        for row in lists:
            there = [j for j in row if j != NOTHING and (of[j].any() if name == "text" else of[j])]
            pairs = [distance(of[a], of[b]) for a, b in combinations(there, 2)]
            means += [np.mean(pairs)] if pairs else []
        if means:
            out[f"diversity_{name}@{k}"] = np.mean(means)
    return out


def example(seed):
    """A random catalogue with holes, lists with holes at the end, histories with unknown items."""
    rng = np.random.default_rng(seed)
    train = np.concatenate([np.zeros(FIRST, np.int64), rng.integers(0, 6, ROWS - FIRST)])
    vectors = rng.normal(size=(ROWS, 4)) * (rng.random((ROWS, 1)) < 0.8)
    values = rng.integers(0, 6, (ROWS, 3))  # PAD, UNKNOWN and repeats among them
    lists = [rng.permutation(np.arange(FIRST, ROWS))[:4].tolist() for _ in range(7)]
    for row in lists:
        row[rng.integers(0, 5) :] = [NOTHING] * (4 - len(row[: rng.integers(0, 5)]))
    lists = [(row + [NOTHING] * 4)[:4] for row in lists]
    histories = [rng.integers(1, ROWS, rng.integers(0, 5)) for _ in lists]
    return train, vectors, values, lists, histories


def spaces(vectors, values):
    return {"text": Vectors(torch.from_numpy(vectors)), "genres": Categories(torch.from_numpy(values))}


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equal_to_the_oracle_with_holes_in_lists_and_features(seed):
    train, vectors, values, lists, histories = example(seed)
    found = ListSums.of(torch.tensor(lists), histories, train, spaces(vectors, values)).means(train)
    sets = [{v for v in row if v >= FIRST} for row in values.tolist()]
    assert found == pytest.approx(oracle(lists, histories, train, vectors, sets), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 7))
def test_sums_of_parts_are_the_sums_of_the_whole(seed, cut):
    train, vectors, values, lists, histories = example(seed)
    space = spaces(vectors, values)
    whole = ListSums.of(torch.tensor(lists), histories, train, space).means(train)
    a, b = (ListSums.of(torch.tensor(lists).view(-1, 4)[s], histories[s], train, space)
            for s in (slice(0, cut), slice(cut, None)))  # fmt: skip
    assert (a + b).means(train) == pytest.approx(whole, abs=1e-12)


def test_a_hand_computed_example():
    train = np.array([0, 0, 8, 4, 2, 2, 0])
    vectors = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 2], [3, 0], [0, 0], [1, 1]])
    genres = torch.tensor([[0, 0], [0, 0], [2, 3], [3, 0], [4, 0], [2, 3], [0, 0]])
    space = {"text": Vectors(vectors), "genres": Categories(genres)}
    found = ListSums.of(torch.tensor([[2, 3], [2, 4]]), [np.array([3, 3]), np.array([4, 2, 1])], train, space)
    assert found.means(train) == pytest.approx(
        {
            "coverage@2": 3 / 5,
            "novelty@2": (1 + 2 + 1 + 3) / 4,
            "popularity_bias@2": (6 + 5) / (4 + 5),
            "diversity_text@2": (1 + 0) / 2,
            "diversity_genres@2": (1 / 2 + 1) / 2,
        }
    )


def test_the_same_list_for_all_covers_no_more_than_itself():
    train = np.arange(ROWS)
    lists = torch.arange(FIRST, FIRST + 3).repeat(50, 1)
    found = ListSums.of(lists, [np.array([FIRST])] * 50, train, {}).means(train)
    assert found["coverage@3"] == pytest.approx(3 / 9)


def test_nobody_has_no_means_but_covers_nothing():
    sums = ListSums.of(torch.zeros(0, 5, dtype=torch.int64), [], np.ones(ROWS, np.int64), {})
    assert sums.means(np.ones(ROWS, np.int64)) == {"coverage@5": 0.0}
