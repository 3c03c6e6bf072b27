"""The models that ours has to beat, from popularity to matrix factorisation. Same split, same ranking code.

Each is fitted on Evidence, whose interactions [U, N] are a CSR with a number of events (or another weight) per user
and item, and scores histories [B, N] of the same form: a history may be longer than what was fitted and of a user
never seen. Scores are dense [B, N]: call with as many users at a time as memory holds. What was seen is not removed
here: the ranking does that. Results repeat exactly for the same input and seed, whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import ItemItemRecommender, bm25_weight, tfidf_weight
from scipy.sparse import csr_matrix, diags
from threadpoolctl import threadpool_limits

from mvrec_core.config import ALSConfig, Baseline, BPRConfig, EvaluateConfig, ItemKNNConfig
from mvrec_core.errors import ConfigError
from mvrec_core.features import MISSING_TIME

BM25_K1, BM25_B = 1.2, 0.75  # as in implicit's BM25Recommender
Features: TypeAlias = np.ndarray | csr_matrix


@dataclass(frozen=True)
class Evidence:
    """What a baseline may be fitted on.

    interactions: CSR [U, N], events before the stage
    recent:       CSR [U, N], the newest of them (see newest)
    content:      float [N, F], dense or CSR: what the items say or are, a zero row where that is not known; or None
    """

    interactions: csr_matrix
    recent: csr_matrix
    content: Features | None = None


class Scorer(Protocol):
    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        """Float [B, N], higher is better, from the histories [B, N] as of the ranking. users: int64 [B], the row of
        the fitted interactions that each of them is; None for users who were not there."""
        ...


def fit(name: Baseline, evidence: Evidence, settings: EvaluateConfig, seed: int = 0, threads: int = 1) -> Scorer:
    """The baseline of that name. Raises ConfigError for `content` without any."""
    interactions = evidence.interactions
    if name == "popularity":
        return fit_popularity(interactions)
    if name == "recent_popularity":
        return fit_popularity(evidence.recent)
    if name == "own_frequency":
        return fit_own_frequency(interactions)
    if name == "item_knn":
        return fit_item_knn(interactions, settings.item_knn, threads)
    if name == "als":
        return fit_als(interactions, settings.als, seed, threads)
    if name == "bpr":
        return fit_bpr(interactions, settings.bpr, seed)
    if evidence.content is None:
        raise ConfigError("evaluate.baselines: 'content' needs a text view or a category view of items, found neither")
    return Content(evidence.content)


@dataclass(frozen=True)
class Popularity:
    """counts: float64 [N], the events of each item."""

    counts: np.ndarray

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        return np.tile(self.counts, (histories.shape[0], 1))


def fit_popularity(interactions: csr_matrix) -> Popularity:
    """The same order for all: how often an item occurs in the interactions."""
    return Popularity(np.asarray(interactions.sum(axis=0), dtype=np.float64).ravel())


def newest(time: np.ndarray, share: float) -> np.ndarray:
    """bool [E] of times int64 [E]: the newest `share` of the dated events, and those as old as the oldest of them.

    A share of the events, not of the span, so it holds as many in a log that thins out. An event without a time is
    not among them; where no event has one all are, and recent popularity is popularity. Where the "times" are places
    in users' sequences, the newest are the late events of the longest histories, which says little of what is recent.
    """
    dated = time != MISSING_TIME
    if not dated.any():
        return np.ones(len(time), dtype=bool)
    oldest = np.sort(time[dated])[int(dated.sum() * (1 - share))]
    return dated & (time >= oldest)


@dataclass(frozen=True)
class OwnFrequency:
    """counts: float64 [N], the events of each item over all users."""

    counts: np.ndarray

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        return histories.toarray() + self.counts / (self.counts.max(initial=0) + 1)  # popularity adds less than 1


def fit_own_frequency(interactions: csr_matrix) -> OwnFrequency:
    """How often the user took the item, ties by popularity: strong where people buy again, and popularity where seen
    items are left out (the "personal top" of Li et al., Next Basket Recommendation Reality Check, TOIS 2023)."""
    return OwnFrequency(fit_popularity(interactions).counts)


@dataclass(frozen=True)
class ItemKNN:
    """similarity: float64 CSR [N, N], the nearest neighbours of each item, itself among them."""

    similarity: csr_matrix

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        return (histories.astype(np.float64) @ self.similarity).toarray()


def fit_item_knn(interactions: csr_matrix, settings: ItemKNNConfig | None = None, threads: int = 1) -> ItemKNN:
    """Similarity of the columns of the interactions, the highest `neighbours` kept (Sarwar et al., WWW 2001).

    cosine, or the cosine after tf-idf, which makes a user with many items say less, or the inner product after BM25:
    the weightings of implicit's recommenders, with their constants. As there, an item is one of its own neighbours:
    that only lifts items already in the history.
    """
    settings = settings or ItemKNNConfig()
    weights = interactions.astype(np.float64)
    if settings.weighting == "tfidf":
        weights = csr_matrix(tfidf_weight(weights.T).T)
    if settings.weighting == "bm25":
        weights = csr_matrix(bm25_weight(weights.T, BM25_K1, BM25_B).T)
    else:
        norm = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=0)).ravel())
        weights = csr_matrix(weights @ diags(np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)))
    model = ItemItemRecommender(K=settings.neighbours, num_threads=threads)
    model.fit(weights, show_progress=False)
    return ItemKNN(model.similarity)


@dataclass(frozen=True)
class ALS:
    """model: fitted implicit ALS, F factors an item."""

    model: AlternatingLeastSquares

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        """The user's factors are solved anew from the history; an empty one scores 0 everywhere."""
        with threadpool_limits(1, "blas"):
            users_BF = self.model.recalculate_user(np.arange(histories.shape[0]), histories.astype(np.float32))
            return users_BF @ self.model.item_factors.T


def fit_als(interactions: csr_matrix, settings: ALSConfig | None = None, seed: int = 0, threads: int = 1) -> ALS:
    """Matrix factorisation for implicit feedback (Hu, Koren and Volinsky, ICDM 2008): confidence alpha x weight."""
    with threadpool_limits(1, "blas"):  # its own threads and those of BLAS would fight for the cores
        model = AlternatingLeastSquares(
            **(settings or ALSConfig()).model_dump(), random_state=seed, num_threads=threads
        )
        model.fit(interactions.astype(np.float32), show_progress=False)
    return ALS(model)


@dataclass(frozen=True)
class BPR:
    """model: fitted implicit BPR, F factors a user and an item, the last the item's bias (1 for a user)."""

    model: BayesianPersonalizedRanking

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        """A fitted user has the factors that were learned, whatever the history; another one the mean of the factors
        of the history's items, with the same biases; an empty history is ranked by the biases."""
        if users is not None:
            users_BF = self.model.user_factors[users]  # a copy
        else:
            total = np.asarray(histories.sum(axis=1)).clip(min=1)
            users_BF = (histories @ self.model.item_factors) / total
        users_BF[:, -1] = 1  # also of a user who had no event
        with threadpool_limits(1, "blas"):
            return users_BF.astype(np.float32) @ self.model.item_factors.T


def fit_bpr(interactions: csr_matrix, settings: BPRConfig | None = None, seed: int = 0) -> BPR:
    """Matrix factorisation by pairs (Rendle et al., UAI 2009). One thread: several would write over each other."""
    model = BayesianPersonalizedRanking(**(settings or BPRConfig()).model_dump(), random_state=seed, num_threads=1)
    model.fit(interactions.astype(np.float32), show_progress=False)
    return BPR(model)


@dataclass(frozen=True)
class Content:
    """features: float [N, F], dense or CSR, a zero row for an item of which nothing is known."""

    features: Features

    def scores(self, histories: csr_matrix, users: np.ndarray | None = None) -> np.ndarray:
        """The cosine between the mean of the history's features and an item's (Lops et al., Recommender Systems
        Handbook 2011, 3.3.1.2); 0 for an item or a history without any. Of no user but this one."""
        mean_BF = histories.astype(np.float32) @ self.features  # its length does not matter
        mean_BF = mean_BF if isinstance(mean_BF, np.ndarray) else mean_BF.toarray()
        with threadpool_limits(1, "blas"):
            product_BN = np.asarray(self.features @ mean_BF.T).T
        length_BN = np.outer(_length(mean_BF), _length(self.features))
        return np.divide(product_BN, length_BN, out=np.zeros_like(length_BN), where=length_BN > 0)


def _length(rows: Features) -> np.ndarray:
    """float64 [n], the Euclidean norm of each row."""
    squares = rows.power(2) if isinstance(rows, csr_matrix) else rows.astype(np.float64) ** 2
    return np.sqrt(np.asarray(squares.sum(axis=1)).ravel())
