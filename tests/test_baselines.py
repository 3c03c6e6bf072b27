from __future__ import annotations

import typing

import implicit.nearest_neighbours as public
import numpy as np
import pytest
from movielens import leave_one_out, needs_movielens
from scipy.sparse import csr_matrix

from mvrec_core.baselines import (
    Content,
    Evidence,
    fit,
    fit_als,
    fit_bpr,
    fit_item_knn,
    fit_own_frequency,
    fit_popularity,
    newest,
)
from mvrec_core.config import ALSConfig, Baseline, BPRConfig, EvaluateConfig, ItemKNNConfig
from mvrec_core.errors import ConfigError
from mvrec_core.features import MISSING_TIME
from mvrec_core.metrics import RankingSums, ranks

TOY = csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]], dtype=np.float64))


def test_popularity_counts_events_for_every_history():
    scores = fit_popularity(TOY).scores(csr_matrix((2, 4)))
    assert scores.tolist() == [[3, 2, 2, 1]] * 2


def test_item_knn_scores_are_sums_of_cosines():
    model = fit_item_knn(TOY, ItemKNNConfig(neighbours=4))
    dense = TOY.toarray()
    unit = dense / np.linalg.norm(dense, axis=0)
    history = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert model.scores(csr_matrix(history)) == pytest.approx(history @ (unit.T @ unit))


def test_item_knn_keeps_only_the_nearest():
    model = fit_item_knn(TOY, ItemKNNConfig(neighbours=2))
    assert np.diff(model.similarity.indptr).tolist() == [2, 2, 2, 2]
    assert model.scores(csr_matrix(np.eye(4)))[0] == pytest.approx([1, 2 / np.sqrt(6), 0, 0])


def test_als_solves_the_weighted_least_squares_of_a_new_history():
    model = fit_als(TOY, ALSConfig(factors=2, regularization=0.1, alpha=3.0))
    items = model.model.item_factors.astype(np.float64)
    history = np.array([0, 2, 1, 0])  # confidence 3 x weight where there is an event, else 1
    confidence = np.where(history > 0, 3.0 * history, 1.0)
    left = items.T @ (confidence[:, None] * items) + 0.1 * np.eye(2)
    user = np.linalg.solve(left, items.T @ (confidence * (history > 0)))
    assert model.scores(csr_matrix(history[None]))[0] == pytest.approx(items @ user, abs=1e-4)


def test_als_scores_nothing_for_an_empty_history():
    assert fit_als(TOY, ALSConfig(factors=2)).scores(csr_matrix((1, 4))).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("weighting", "model"), [("tfidf", public.TFIDFRecommender(K=7)), ("bm25", public.BM25Recommender(K=7))]
)
def test_item_knn_weightings_are_those_of_the_library(weighting, model):
    rng = np.random.default_rng(0)
    interactions = csr_matrix(rng.integers(0, 3, (30, 20)) * (rng.random((30, 20)) < 0.4), dtype=np.float64)
    model.fit(interactions, show_progress=False)
    ours = fit_item_knn(interactions, ItemKNNConfig(weighting=weighting, neighbours=7))
    assert ours.similarity.toarray() == pytest.approx(model.similarity.toarray(), abs=1e-9)
    assert abs(ours.similarity - fit_item_knn(interactions, ItemKNNConfig(neighbours=7)).similarity).max() > 0.01


def test_own_frequency_counts_the_users_own_events_and_breaks_ties_by_popularity():
    scores = fit_own_frequency(TOY).scores(csr_matrix([[0, 1, 0, 3], [0, 0, 0, 0], [1, 1, 1, 1]]))
    assert scores[0].argsort().tolist() == [2, 0, 1, 3]  # what was never taken, by popularity 2 < 3; once; thrice
    assert scores[1] == pytest.approx([3 / 4, 2 / 4, 2 / 4, 1 / 4])
    assert scores[2] == pytest.approx(scores[1] + 1)


def test_the_newest_are_a_share_of_the_dated_events():
    time = np.array([50, MISSING_TIME, 10, 40, 30, 20])
    assert newest(time, 0.4).tolist() == [True, False, False, True, False, False]
    assert newest(time, 1.0).tolist() == [True, False, True, True, True, True]
    assert newest(np.array([7, 7, 7, 1]), 0.25).tolist() == [True, True, True, False]  # ties stay together


def test_without_any_time_all_are_the_newest():
    assert newest(np.full(3, MISSING_TIME), 0.1).all()
    assert newest(np.zeros(0, np.int64), 0.1).tolist() == []


def test_recent_popularity_counts_recent_events_only():
    recent = csr_matrix(([1.0, 1.0], ([0, 1], [3, 3])), shape=(4, 4))
    scorer = fit("recent_popularity", Evidence(TOY, recent), EvaluateConfig())
    assert scorer.scores(csr_matrix((1, 4))).tolist() == [[0, 0, 0, 2]]


def test_bpr_learns_which_group_a_user_belongs_to():
    rng = np.random.default_rng(0)
    group, item = np.arange(80)[:, None] % 2, np.arange(40)[None] % 2
    interactions = csr_matrix(((group == item) & (rng.random((80, 40)) < 0.5)).astype(np.float32))
    model = fit_bpr(interactions, BPRConfig(factors=8, learning_rate=0.05))
    known = model.scores(interactions, np.arange(80))
    new = model.scores(interactions)  # the same histories of users who were not fitted
    for scores in (known, new):
        own, other = (scores[np.broadcast_to(group == item if same else group != item, scores.shape)].mean()
                      for same in (True, False))  # fmt: skip
        assert own > other + 0.5


def test_bpr_ranks_an_empty_history_by_the_biases():
    interactions = csr_matrix(np.vstack([TOY.toarray(), np.zeros(4)]))
    model = fit_bpr(interactions, BPRConfig(factors=3))
    bias = model.model.item_factors[:, -1]
    assert model.scores(csr_matrix((1, 4)))[0] == pytest.approx(bias)
    assert model.scores(csr_matrix((1, 4)), np.array([4]))[0] == pytest.approx(bias)


def test_bpr_scores_a_fitted_user_by_what_was_learned():
    model = fit_bpr(TOY, BPRConfig(factors=3))
    users = model.scores(TOY[[2, 0]], np.array([2, 0]))
    assert users == pytest.approx(model.model.user_factors[[2, 0]] @ model.model.item_factors.T)


@pytest.mark.parametrize("form", [np.array, csr_matrix])
def test_content_is_the_cosine_with_the_mean_of_the_history(form):
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]], dtype=np.float32)
    scores = Content(form(rows)).scores(csr_matrix([[1, 1, 0, 0], [0, 0, 0, 1], [0, 2, 0, 1]]))
    mean = np.array([0.5, 1.0])
    cosine = [rows[j] @ mean / np.linalg.norm(mean) / np.linalg.norm(rows[j]) for j in range(3)]
    assert scores[0] == pytest.approx([*cosine, 0])
    assert scores[1].tolist() == [0, 0, 0, 0]
    assert scores[2] == pytest.approx([0, 1, 0.5**0.5, 0])


def test_content_without_content():
    with pytest.raises(ConfigError, match="'content' needs a text view or a category view of items, found neither"):
        fit("content", Evidence(TOY, TOY), EvaluateConfig())


@pytest.mark.parametrize("name", typing.get_args(Baseline))
def test_results_repeat_whatever_the_threads(name):
    rng = np.random.default_rng(0)
    interactions = csr_matrix((rng.random((60, 90)) < 0.1).astype(np.float64))
    evidence = Evidence(interactions, interactions, rng.normal(size=(90, 5)).astype(np.float32))
    one, two = (
        fit(name, evidence, EvaluateConfig(), seed=5, threads=threads).scores(interactions, np.arange(60))
        for threads in (1, 2)
    )
    assert one.shape == (60, 90) and np.array_equal(one, two)


@needs_movielens
@pytest.mark.parametrize(
    ("name", "settings", "hr", "ndcg"),
    [
        ("popularity", {}, 0.086, 0.045),
        ("item_knn", {}, 0.116, 0.058),
        ("item_knn", {"item_knn": {"weighting": "tfidf"}}, 0.122, 0.060),
        ("als", {}, 0.143, 0.075),
        ("als", {"als": {"regularization": 10}}, 0.141, 0.073),
        ("bpr", {}, 0.135, 0.068),
    ],
)
def test_movielens_test_figures_agree_with_public_peers(name, settings, hr, ndcg):
    fitted, target = leave_one_out()
    scorer = fit(name, Evidence(fitted, fitted), EvaluateConfig.model_validate(settings))
    scores = scorer.scores(fitted, np.arange(fitted.shape[0]))
    means = RankingSums.from_ranks(ranks(scores, target, fitted.toarray() > 0)).means()
    assert means["HR@10"] == pytest.approx(hr, abs=0.01)
    assert means["NDCG@10"] == pytest.approx(ndcg, abs=0.01)
