"""What top-k lists are like besides being right: coverage, novelty, diversity, popularity bias. Sums that add up.

Shapes: B users, N catalogue rows (PAD and UNKNOWN included), K places of a list, F features.
Lists are int64 [B, K] rows of the catalogue; NOTHING fills the places for which no item was left.

    coverage    items in any list / items of the catalogue ("aggregate diversity": Adomavicius and Kwon, TKDE 2012)
    novelty     mean over recommended items of -log2 p_j, p_j the item's share of train events (self-information:
                Zhou et al., PNAS 2010); an item without train events counts as having one
    diversity   mean over lists of the mean over pairs of items of their distance (Ziegler et al., WWW 2005): 1 - cosine
                of vectors, or 1 - |A and B| / |A or B| of sets of categories. Pairs of which an item has no features
                are left out, and so are lists without a pair
    popularity_bias  ARP ratio: the mean over users of the mean train events of the recommended items (Yin et al.,
                VLDB 2012), divided by that of the items of their own histories (GAP of Abdollahpouri et al., RMSE
                2019). 1: lists as popular as what the users took themselves; above: the model pushes what is popular
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core.catalog import FIRST
from mvrec_core.index import NOTHING


class Space(Protocol):
    """A way to tell how far apart two items are."""

    def distances(self, lists: Tensor) -> tuple[Tensor, Tensor]:
        """lists [B, K], rows of the catalogue -> distances [B, K, K] and, bool [B, K], which items have a place."""
        ...


class Vectors:
    """1 - cosine. vectors: float [N, F], a zero row for an item without one."""

    def __init__(self, vectors: Tensor):
        self.unit_NF = F.normalize(vectors.double(), dim=1)

    def distances(self, lists: Tensor) -> tuple[Tensor, Tensor]:
        unit_BKF = self.unit_NF[lists]
        return 1 - unit_BKF @ unit_BKF.mT, (unit_BKF != 0).any(-1)


class Categories:
    """Jaccard distance. values: int64 [N, M], each item's categories; below FIRST there is none (or one that train
    does not know), and repeated ones count once."""

    def __init__(self, values: Tensor):
        ordered_NM = values.sort(dim=1).values
        repeated = F.pad(ordered_NM[:, 1:] == ordered_NM[:, :-1], (1, 0))
        self.values_NM = ordered_NM.masked_fill(repeated | (ordered_NM < FIRST), 0)

    def distances(self, lists: Tensor) -> tuple[Tensor, Tensor]:
        values_BKM = self.values_NM[lists]
        size_BK = (values_BKM > 0).sum(-1)
        one, other = values_BKM[:, :, None, :, None], values_BKM[:, None, :, None, :]
        common_BKK = ((one == other) & (one > 0)).sum((-1, -2))
        either_BKK = size_BK[:, :, None] + size_BK[:, None, :] - common_BKK
        return 1 - common_BKK.double() / either_BKK.clamp(min=1), size_BK > 0


@dataclass(frozen=True)
class ListSums:
    """What a set of users' lists adds. Sums of disjoint sets of users add up to the sums of their union.

    k:         places of a list
    shown:     int64 [N], in how many lists each item is
    users:     users with an item in their list and one in their history, for the popularity bias
    listed:    over those, the sum of the mean train events of the recommended items
    taken:     and of the items in their histories, an item as often as it was taken
    spread:    name of a space -> (sum of the lists' mean distances, lists with a pair)
    """

    k: int
    shown: np.ndarray
    users: int
    listed: float
    taken: float
    spread: Mapping[str, tuple[float, int]]

    @staticmethod
    def of(lists: Tensor, histories: list[np.ndarray], train: np.ndarray, spaces: Mapping[str, Space]) -> ListSums:
        """histories: B arrays of rows of the catalogue; train: int64 [N], train events of each item."""
        chosen = lists != NOTHING
        safe, events = lists.clamp(min=0), torch.from_numpy(train).double().to(lists.device)
        size = chosen.sum(1)
        listed = ((events[safe] * chosen).sum(1) / size.clamp(min=1)).cpu().numpy()
        known = [history[history >= FIRST] for history in histories]
        taken = np.array([train[history].mean() if len(history) else 0.0 for history in known])
        both = (size.cpu().numpy() > 0) & np.array([len(history) > 0 for history in known], dtype=bool)
        shown = torch.bincount(lists[chosen], minlength=len(train)).cpu().numpy()
        spread = {name: _spread(space, safe, chosen) for name, space in spaces.items()}
        return ListSums(
            lists.shape[1], shown, int(both.sum()), float(listed[both].sum()), float(taken[both].sum()), spread
        )

    def __add__(self, other: ListSums) -> ListSums:
        spread = {
            name: (total + other.spread[name][0], count + other.spread[name][1])
            for name, (total, count) in self.spread.items()
        }
        return ListSums(
            self.k,
            self.shown + other.shown,
            self.users + other.users,
            self.listed + other.listed,
            self.taken + other.taken,
            spread,
        )

    def means(self, train: np.ndarray) -> dict[str, float]:
        """{"coverage@10": ..., "novelty@10": ..., "popularity_bias@10": ..., "diversity_<space>@10": ...}; a mean over
        nothing is left out. train as in `of`."""
        k, places = self.k, int(self.shown.sum())
        out = {f"coverage@{k}": float((self.shown[FIRST:] > 0).mean())} if len(self.shown) > FIRST else {}
        if places and train.sum():
            information = -np.log2(np.maximum(train, 1) / train.sum())
            out[f"novelty@{k}"] = float(self.shown @ information / places)
        if self.taken:
            out[f"popularity_bias@{k}"] = self.listed / self.taken
        return out | {f"diversity_{name}@{k}": total / n for name, (total, n) in self.spread.items() if n}


def _spread(space: Space, lists: Tensor, chosen: Tensor) -> tuple[float, int]:
    """The sum over lists of the mean distance of their pairs, and how many lists have a pair."""
    distance_BKK, placed_BK = space.distances(lists)
    placed_BK = placed_BK & chosen
    pair_BKK = placed_BK[:, :, None] & placed_BK[:, None, :]
    pair_BKK = pair_BKK & ~torch.eye(lists.shape[1], dtype=torch.bool, device=lists.device)
    count_B = pair_BKK.sum((1, 2))
    mean_B = (distance_BKK * pair_BKK).sum((1, 2)) / count_B.clamp(min=1)
    return float(mean_B.sum()), int((count_B > 0).sum())
