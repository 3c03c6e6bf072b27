from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core.errors import MVRecError
from mvrec_core.index import NOTHING, best, top_k


def by_full_sort(scores: torch.Tensor, eligible: torch.Tensor, k: int) -> list[list[int]]:
    lists = []
    for row, open_ in zip(scores.tolist(), eligible.tolist(), strict=True):
        order = sorted((j for j in range(len(row)) if open_[j]), key=lambda j: (-row[j], j))
        lists.append((order + [NOTHING] * k)[:k])
    return lists


def test_hand_made_scores_with_scale_and_bias():
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    best = top_k(torch.tensor([[1.0, 0.0]]), items, 2, scale=10.0, bias=torch.tensor(-1.0))
    assert best.index.tolist() == [[0, 2]]
    assert best.score.tolist() == [[9.0, 5.0]]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), k=st.integers(1, 12), chunk=st.integers(1, 45))
def test_equal_to_a_full_sort_with_many_ties_and_masks_for_any_chunk(seed, n, k, chunk):
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(-1, 2, (5, 2), generator=generator).float()  # small integers: exact products, many ties
    items = torch.randint(-1, 2, (n, 2), generator=generator).float()
    eligible = torch.rand(5, n, generator=generator) < 0.6
    best = top_k(users, items, k, eligible, chunk=chunk)
    assert best.index.tolist() == by_full_sort(users @ items.T, eligible, k)
    filled = best.index != NOTHING
    assert torch.equal(best.score[filled], (users @ items.T).gather(1, best.index.clamp(min=0))[filled])
    assert (best.score[~filled] == -torch.inf).all()


def test_equal_to_a_full_sort_on_a_large_catalogue():
    torch.manual_seed(0)
    users, items = torch.randn(4, 16, dtype=torch.float64), torch.randn(20_000, 16, dtype=torch.float64)
    best = top_k(users, items, 50, chunk=3000)
    assert best.index.tolist() == (users @ items.T).argsort(1, descending=True)[:, :50].tolist()


def test_all_equal_scores_come_in_order_of_index():
    assert top_k(torch.zeros(1, 3), torch.ones(100, 3), 5, chunk=7).index.tolist() == [[0, 1, 2, 3, 4]]


def test_more_wanted_than_there_is():
    best = top_k(torch.ones(2, 1), torch.ones(3, 1), 4, torch.tensor([[False, True, False], [False] * 3]))
    assert best.index.tolist() == [[1, NOTHING, NOTHING, NOTHING], [NOTHING] * 4]


def test_not_a_number_is_refused():
    with pytest.raises(MVRecError, match="NaN"):
        top_k(torch.tensor([[float("nan")]]), torch.ones(2, 1), 1)


def test_shapes_and_k_are_checked():
    with pytest.raises(ValueError, match="k >= 1"):
        top_k(torch.ones(1, 2), torch.ones(3, 2), 0)
    with pytest.raises(ValueError, match="widths"):
        top_k(torch.ones(1, 2), torch.ones(3, 3), 1)
    with pytest.raises(ValueError, match=r"bool \[1, 3\]"):
        top_k(torch.ones(1, 2), torch.ones(3, 2), 1, torch.ones(1, 4, dtype=torch.bool))


def test_best_of_scores_is_a_stable_sort_of_what_may_come():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (20, 30)).astype(np.float32))
    scores[scores == 0] = -torch.inf
    found = best(scores, 12)
    for row, index, score in zip(scores, found.index, found.score, strict=True):
        order = row.sort(descending=True, stable=True)
        assert score.tolist() == order.values[:12].tolist()
        assert index.tolist() == order.indices[:12].masked_fill(order.values[:12] == -torch.inf, NOTHING).tolist()


def test_best_fills_up_with_nothing():
    found = best(torch.tensor([[1.0, -torch.inf, 3.0]]), 5)
    assert (found.index.tolist(), found.score[0, 2:].isinf().all()) == ([[2, 0, NOTHING, NOTHING, NOTHING]], True)


def test_best_refuses_nan_and_no_places():
    with pytest.raises(MVRecError, match="found NaN"):
        best(torch.tensor([[0.0, torch.nan]]), 1)
    with pytest.raises(ValueError, match="expected k >= 1, found 0"):
        best(torch.zeros(1, 2), 0)
