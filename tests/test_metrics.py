from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from movielens import leave_one_out, needs_movielens

from mvrec_core.baselines import Evidence, fit
from mvrec_core.config import EvaluateConfig
from mvrec_core.errors import MVRecError
from mvrec_core.metrics import CUTOFFS, NAMES, RankingSums, Ranks, bootstrap, per_user, ranks


def oracle(scores: list[float], target: int, excluded: set[int]) -> dict[str, float]:
    """One user by hand: every order of the tied items is tried, and the metrics are averaged."""
    candidates = [j for j in range(len(scores)) if j not in excluded]
    if target not in candidates:
        return dict.fromkeys(NAMES, 0.0)
    above = [j for j in candidates if scores[j] > scores[target]]
    tied = [j for j in candidates if scores[j] == scores[target]]
    found = []
    for order in permutations(tied):
        rank = len(above) + order.index(target) + 1
        metrics = {f"HR@{k}": float(rank <= k) for k in CUTOFFS}
        metrics |= {f"NDCG@{k}": 1 / math.log2(rank + 1) if rank <= k else 0.0 for k in CUTOFFS}
        metrics |= {f"MRR@{k}": 1 / rank if rank <= k else 0.0 for k in CUTOFFS}
        others = len(candidates) - 1
        metrics["AUC"] = (len(candidates) - rank) / others if others else 0.5
        found.append(metrics)
    return {name: sum(m[name] for m in found) / len(found) for name in NAMES}


def test_a_hand_computed_example():
    scores = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.2, 0.2, 0.9]])
    means = RankingSums.from_ranks(ranks(scores, [2, 0])).means()
    assert means["HR@1"] == 0.0  # second of four; and tied on places 2, 3, 4
    assert means["HR@5"] == 1.0
    assert means["NDCG@10"] == pytest.approx((1 / math.log2(3) + (1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)) / 3) / 2)
    assert means["MRR@10"] == pytest.approx((1 / 2 + (1 / 2 + 1 / 3 + 1 / 4) / 3) / 2)
    assert means["AUC"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_expected_rank_counts_half_of_the_tied():
    assert ranks(np.array([[3.0, 1.0, 1.0, 1.0]]), [1]).expected.tolist() == [3.0]


@settings(max_examples=150, deadline=None)
@given(
    scores=arrays(np.float64, (4, 6), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])),
    target=st.lists(st.integers(-1, 5), min_size=4, max_size=4),
    excluded=arrays(np.bool_, (4, 6)),
)
def test_equal_to_the_oracle_with_ties_exclusions_and_missing_targets(scores, target, excluded):
    values = per_user(ranks(torch.from_numpy(scores), torch.tensor(target), torch.from_numpy(excluded)))
    for b in range(4):
        expected = oracle(scores[b].tolist(), target[b], set(np.flatnonzero(excluded[b]).tolist()))
        assert values[b] == pytest.approx([expected[name] for name in NAMES], abs=1e-9)


def test_equal_to_a_full_sort_on_a_large_catalogue():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(50, 700)), rng.integers(700, size=50)
    rank = [1 + np.argsort(-row).tolist().index(t) for row, t in zip(scores, target, strict=True)]
    means = RankingSums.from_ranks(ranks(scores, target)).means()
    for k in CUTOFFS:
        assert means[f"HR@{k}"] == pytest.approx(np.mean([r <= k for r in rank]), abs=1e-9)
        assert means[f"NDCG@{k}"] == pytest.approx(np.mean([(r <= k) / math.log2(r + 1) for r in rank]), abs=1e-9)
    assert means["AUC"] == pytest.approx(np.mean([(700 - r) / 699 for r in rank]), abs=1e-9)


@needs_movielens
@pytest.mark.parametrize("name", ["popularity", "item_knn"])
def test_equal_to_a_public_library_on_real_lists(name):
    """ranx has no rule for ties, so both get the lists in one order."""
    from ranx import Qrels, Run  # here, as importing them takes seconds
    from ranx import evaluate as public

    fitted, target = leave_one_out()
    users, seen = np.arange(fitted.shape[0]), fitted.toarray() > 0
    scores = fit(name, Evidence(fitted, fitted), EvaluateConfig()).scores(fitted, users)
    order = np.argsort(-np.where(seen, -np.inf, scores), axis=1, kind="stable")
    scores = -np.argsort(order, axis=1).astype(float)
    qrels = Qrels({str(u): {str(target[u]): 1} for u in users})
    run = Run({str(u): {str(j): scores[u, j] for j in order[u, :20]} for u in users})
    means = RankingSums.from_ranks(ranks(scores, target, seen)).means()
    pairs = (("HR", "hit_rate"), ("NDCG", "ndcg"), ("MRR", "mrr"), ("MRR", "map"))  # of one target, MAP is MRR
    found = public(qrels, run, [f"{theirs}@{k}" for _, theirs in pairs for k in CUTOFFS])
    for ours, theirs in pairs:
        for k in CUTOFFS:
            assert means[f"{ours}@{k}"] == pytest.approx(found[f"{theirs}@{k}"], abs=1e-9)
    assert found["map@20"] > 0.01


def test_excluded_as_lists_equals_excluded_as_a_mask():
    scores = np.arange(8.0).reshape(2, 4)
    mask = np.array([[False, False, False, True], [False, True, True, False]])
    assert ranks(scores, [2, 0], [[3], [1, 2]]).above.tolist() == ranks(scores, [2, 0], mask).above.tolist() == [0, 1]


def test_the_callers_mask_is_left_alone():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    ranks(torch.rand(1, 3), [0], mask)
    assert not mask.any()


def test_a_target_that_cannot_be_ranked_is_a_miss_and_its_user_counts():
    sums = RankingSums.from_ranks(ranks(np.array([[1.0, 0.0]] * 3), [-1, 0, 0], [[], [0], []]))
    assert (sums.users, sums.unrankable) == (3, 2)
    assert sums.means()["HR@20"] == sums.means()["AUC"] == pytest.approx(1 / 3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 101), max_size=5))
def test_sums_of_any_split_add_up_to_the_whole(seed, cuts):
    rng = np.random.default_rng(seed)
    ranked = ranks(rng.integers(5, size=(101, 30)).astype(float), rng.integers(-1, 30, size=101))
    whole = RankingSums.from_ranks(ranked)
    edges = [0, *sorted(cuts), 101]
    parts = [RankingSums.from_ranks(ranked[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert sum(parts, RankingSums()).means() == pytest.approx(whole.means(), abs=1e-9)
    assert sum(parts, RankingSums()).users == 101
    reduced = RankingSums.from_vector(torch.stack([part.as_vector() for part in parts]).sum(0))
    assert (reduced.users, reduced.unrankable) == (101, whole.unrankable)
    assert reduced.means() == pytest.approx(whole.means(), abs=1e-9)


def test_no_users_have_no_means():
    assert RankingSums.from_ranks(Ranks.concatenate([])).means() == {}
    assert bootstrap(Ranks.concatenate([]), seed=0) == {}


def test_nan_is_refused_and_located():
    with pytest.raises(MVRecError, match="user row 1, item column 2"):
        ranks(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, np.nan]]), [0, 0])


@pytest.mark.parametrize("target, excluded", [([0], None), ([0, 9], None), ([0, 0], [[1]]), ([0, 0], np.zeros((2, 3)))])
def test_shapes_that_do_not_fit_are_refused(target, excluded):
    with pytest.raises(ValueError, match="expected"):
        ranks(np.zeros((2, 3)), target, excluded)


def test_bootstrap_covers_the_mean_repeats_and_ignores_the_order_of_users():
    rng = np.random.default_rng(1)
    ranked = ranks(rng.normal(size=(300, 40)), rng.integers(40, size=300))
    interval = bootstrap(ranked, seed=3)
    assert list(interval) == list(NAMES)
    assert interval == bootstrap(ranked[rng.permutation(300)], seed=3)
    mean = RankingSums.from_ranks(ranked).means()["HR@10"]
    low, high = interval["HR@10"]
    half = 1.96 * math.sqrt(mean * (1 - mean) / 300)  # of the normal approximation
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
