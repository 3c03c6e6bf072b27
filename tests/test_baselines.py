from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mvrec_core.baselines import fit, fit_als, fit_item_knn, fit_popularity
from mvrec_core.metrics import RankingSums, ranks

TOY = csr_matrix(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]], dtype=np.float64))
LOG = Path(__file__).parent.parent / "data" / "ml-100k" / "ml-100k.inter"


def test_popularity_counts_events_for_every_history():
    scores = fit_popularity(TOY).scores(csr_matrix((2, 4)))
    assert scores.tolist() == [[3, 2, 2, 1]] * 2


def test_item_knn_scores_are_sums_of_cosines():
    model = fit_item_knn(TOY, neighbours=4)
    dense = TOY.toarray()
    unit = dense / np.linalg.norm(dense, axis=0)
    history = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert model.scores(csr_matrix(history)) == pytest.approx(history @ (unit.T @ unit))


def test_item_knn_keeps_only_the_nearest():
    model = fit_item_knn(TOY, neighbours=2)
    assert np.diff(model.similarity.indptr).tolist() == [2, 2, 2, 2]
    assert model.scores(csr_matrix(np.eye(4)))[0] == pytest.approx([1, 2 / np.sqrt(6), 0, 0])


def test_als_solves_the_weighted_least_squares_of_a_new_history():
    model = fit_als(TOY, factors=2, regularization=0.1, alpha=3.0)
    items = model.model.item_factors.astype(np.float64)
    history = np.array([0, 2, 1, 0])  # confidence 3 x weight where there is an event, else 1
    confidence = np.where(history > 0, 3.0 * history, 1.0)
    left = items.T @ (confidence[:, None] * items) + 0.1 * np.eye(2)
    user = np.linalg.solve(left, items.T @ (confidence * (history > 0)))
    assert model.scores(csr_matrix(history[None]))[0] == pytest.approx(items @ user, abs=1e-4)


def test_als_scores_nothing_for_an_empty_history():
    assert fit_als(TOY, factors=2).scores(csr_matrix((1, 4))).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["popularity", "item_knn", "als"])
def test_results_repeat_whatever_the_threads(name):
    rng = np.random.default_rng(0)
    interactions = csr_matrix((rng.random((60, 90)) < 0.1).astype(np.float64))
    one, two = (fit(name, interactions, seed=5, threads=threads).scores(interactions) for threads in (1, 2))
    assert np.array_equal(one, two)


@pytest.mark.skipif(not LOG.exists(), reason=f"needs MovieLens-100K at {LOG} (python -m pipelines.fetch)")
@pytest.mark.parametrize(
    "name, hr, ndcg", [("popularity", 0.086, 0.045), ("item_knn", 0.116, 0.058), ("als", 0.143, 0.075)]
)
def test_movielens_test_figures_agree_with_public_peers(name, hr, ndcg):
    fitted, target = _movielens()
    scores = fit(name, fitted).scores(fitted)
    means = RankingSums.from_ranks(ranks(scores, target, fitted.toarray() > 0)).means()
    assert means["HR@10"] == pytest.approx(hr, abs=0.01)
    assert means["NDCG@10"] == pytest.approx(ndcg, abs=0.01)


def _movielens() -> tuple[csr_matrix, np.ndarray]:
    """All events but each user's last, [943, 1682], and the items of the last: ties of time keep the file's order."""
    with LOG.open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    log = np.array(rows, dtype=np.int64)
    user, item, _, time = log[np.lexsort((log[:, 3], log[:, 0]))].T
    last = np.append(user[1:] != user[:-1], True)
    shape = (943, 1682)
    return csr_matrix((np.ones((~last).sum()), (user[~last] - 1, item[~last] - 1)), shape=shape), item[last] - 1
