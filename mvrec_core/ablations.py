"""What each view is worth to a trained model: metrics without it and with it alone, and how far the views disagree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvrec_core.index import NOTHING
from mvrec_core.masking import removable
from mvrec_core.metrics import RankingSums
from mvrec_core.recommender import Recommender

PERSISTENCE = 0.9  # the first ten places of a list then weigh 86%
DEPTH = 100  # of the lists that are compared
USERS = 2_000  # of a stage that has more: each view costs another pass over them


@dataclass(frozen=True)
class ViewConflict:
    """How far the rankings by each item-level view alone disagree.

    user:  int64 [B], rows of the recommender's histories
    score: float64 [B], 1 - the mean overlap of the lists of every two views: 0 the same list, 1 nothing in common;
           empty where there are fewer than two item-level views
    pairs: {(view, view): the mean overlap over users}
    """

    user: np.ndarray
    score: np.ndarray
    pairs: Mapping[tuple[str, str], float]

    def summary(self) -> dict:
        """For JSON: {"mean", "quartiles": [low, median, high], "overlap": {"id~text": ...}}; {} without scores."""
        if not len(self.score):
            return {}
        return {
            "mean": float(self.score.mean()),
            "quartiles": np.quantile(self.score, [0.25, 0.5, 0.75]).tolist(),
            "overlap": {"~".join(pair): overlap for pair, overlap in self.pairs.items()},
        }


def views_removed(recommender: Recommender, stage: str, most: int = USERS) -> dict[str, dict[str, Any]]:
    """Metrics of "valid" or "test" with views hidden from the trained model:
    {"view_removed": {view: {"HR@10": ...}}, "view_alone": {item-level view: {...}}, "view_all": {"users": ..., "HR@10":
    ...}}; the last of the whole model. All are of the same users, at most so many.

    The only item-level view is never removed, as nothing would be left to rank by.
    """
    config = recommender.config

    def sums(hidden: set[str]) -> RankingSums:
        return RankingSums.from_ranks(recommender.stored.ranks(stage, hidden, most=most)[1])

    def measured(hidden: set[str]) -> dict[str, float]:
        return sums(hidden).means()

    whole = sums(set())
    return {
        "view_all": {"users": whole.users, **whole.means()},
        "view_removed": {name: measured({name}) for name in removable(config)},
        "view_alone": {name: measured(set(config.views) - {name}) for name in config.views_at("item")},
    }


def view_conflict(recommender: Recommender, stage: str, depth: int = DEPTH, most: int = USERS) -> ViewConflict:
    """Of the users of "valid" or "test", at most so many, from the lists that each item-level view alone would give."""
    config = recommender.config
    names = list(config.views_at("item"))
    depth = min(depth, recommender.n_items)
    lists = {name: recommender.stored.best_rows(stage, depth, set(config.views) - {name}, most) for name in names}
    user = next(iter(lists.values()))[0].user
    if len(names) < 2:
        return ViewConflict(user, np.empty(0), {})
    pairs = {(a, b): rank_biased_overlap(lists[a][1], lists[b][1]) for a, b in combinations(names, 2)}
    mean_B = torch.stack(list(pairs.values())).mean(0)
    return ViewConflict(user, 1 - mean_B.cpu().numpy(), {pair: float(each.mean()) for pair, each in pairs.items()})


def rank_biased_overlap(one_Bk: Tensor, other_Bk: Tensor, p: float = PERSISTENCE, chunk: int = 256) -> Tensor:
    """float64 [B], 0 .. 1: how alike two lists of k distinct items are, their heads weighing most; NOTHING is no item.

    Extrapolated rank-biased overlap (Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM
    TOIS 28(4), 2010, equation 30): with X_d the items that the first d of both have in common,
    X_k / k p^k + (1 - p) / p sum over d = 1 .. k of X_d / d p^d.
    """
    parts = []
    for one, other in zip(one_Bk.split(chunk), other_Bk.split(chunk), strict=True):
        k = one.shape[1]
        same_Bkk = (one[:, :, None] == other[:, None, :]) & (one[:, :, None] != NOTHING)
        depth = torch.arange(1, k + 1, device=one.device, dtype=torch.float64)
        place = torch.arange(k, device=one.device)
        enters_kk = torch.maximum(place[:, None], place)  # the depth, from 0, at which both lists have it
        common_Bk = torch.zeros(one.shape, dtype=torch.float64, device=one.device)
        common_Bk.index_add_(1, enters_kk.flatten(), same_Bkk.flatten(1).double())
        agreement_Bk = common_Bk.cumsum(1) / depth
        parts.append(agreement_Bk[:, -1] * p**k + (1 - p) / p * (agreement_Bk * p**depth).sum(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
