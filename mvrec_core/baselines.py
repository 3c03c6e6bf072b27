"""The models that ours has to beat: popularity, item-kNN, matrix factorisation. Same split, same ranking code.

Each is fitted on interactions [U, N] and scores histories [B, N], both CSR with a number of events (or another weight)
per user and item, so a history may be longer than what was fitted and of a user never seen. Scores are dense
[B, N]: call with as many users at a time as memory holds. What was seen is not removed here: the ranking does that.
Results repeat exactly for the same input and seed, whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import ItemItemRecommender
from scipy.sparse import csr_matrix, diags
from threadpoolctl import threadpool_limits

Baseline = Literal["popularity", "item_knn", "als"]


class Scorer(Protocol):
    def scores(self, histories: csr_matrix) -> np.ndarray:
        """Float [B, N], higher is better, from the histories [B, N] as of the ranking."""
        ...


def fit(name: Baseline, interactions: csr_matrix, seed: int = 0, threads: int = 1) -> Scorer:
    """The baseline of that name with its default settings."""
    if name == "popularity":
        return fit_popularity(interactions)
    if name == "item_knn":
        return fit_item_knn(interactions, threads=threads)
    return fit_als(interactions, seed=seed, threads=threads)


@dataclass(frozen=True)
class Popularity:
    """counts: float64 [N], the events of each item."""

    counts: np.ndarray

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return np.tile(self.counts, (histories.shape[0], 1))


def fit_popularity(interactions: csr_matrix) -> Popularity:
    """The same order for all: how often an item occurs in the interactions."""
    return Popularity(np.asarray(interactions.sum(axis=0), dtype=np.float64).ravel())


@dataclass(frozen=True)
class ItemKNN:
    """similarity: float64 CSR [N, N], the nearest neighbours of each item, itself among them."""

    similarity: csr_matrix

    def scores(self, histories: csr_matrix) -> np.ndarray:
        return (histories.astype(np.float64) @ self.similarity).toarray()


def fit_item_knn(interactions: csr_matrix, neighbours: int = 20, threads: int = 1) -> ItemKNN:
    """Cosine between the columns of the interactions, the highest `neighbours` kept (Sarwar et al., WWW 2001).

    As in implicit, an item is one of its own neighbours: that only lifts items already in the history.
    """
    weights = interactions.astype(np.float64)
    norm = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=0)).ravel())
    unit = weights @ diags(np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0))
    model = ItemItemRecommender(K=neighbours, num_threads=threads)  # its CosineRecommender does this, with a warning
    model.fit(csr_matrix(unit), show_progress=False)
    return ItemKNN(model.similarity)


@dataclass(frozen=True)
class ALS:
    """model: fitted implicit ALS, F factors an item."""

    model: AlternatingLeastSquares

    def scores(self, histories: csr_matrix) -> np.ndarray:
        """The user's factors are solved anew from the history; an empty one scores 0 everywhere."""
        with threadpool_limits(1, "blas"):
            users_BF = self.model.recalculate_user(np.arange(histories.shape[0]), histories.astype(np.float32))
            return users_BF @ self.model.item_factors.T


def fit_als(
    interactions: csr_matrix,
    factors: int = 64,
    regularization: float = 0.01,
    alpha: float = 1.0,
    iterations: int = 15,
    seed: int = 0,
    threads: int = 1,
) -> ALS:
    """Matrix factorisation for implicit feedback (Hu, Koren and Volinsky, ICDM 2008): confidence alpha x weight."""
    with threadpool_limits(1, "blas"):  # its own threads and those of BLAS would fight for the cores
        model = AlternatingLeastSquares(
            factors=factors,
            regularization=regularization,
            alpha=alpha,
            iterations=iterations,
            random_state=seed,
            num_threads=threads,
        )
        model.fit(interactions.astype(np.float32), show_progress=False)
    return ALS(model)
