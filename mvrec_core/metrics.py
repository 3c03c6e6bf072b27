"""Full-ranking metrics as sums and counts that add up across batches and workers.

Every user has one target. Ties are broken neutrally: a metric is its exact expectation over all orders of the tied
items (McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
Scores", ECIR 2008), so neither the order of the catalogue nor the sort decides. With a items above the target and e
others tied with it, its position is uniform on a + 1 .. a + e + 1, and a metric with gain g(position) is

    sum over r = a + 1 .. min(k, a + e + 1) of g(r), divided by e + 1
    with g(r) = 1 for HR@k, 1 / log2(r + 1) for NDCG@k, 1 / r for MRR@k

With one target a user there is no more to tell: recall@k is HR@k, precision@k is HR@k / k, and average precision, the
mean over targets of the precision at each, is 1 / r where r <= k, so MAP@k is MRR@k. None is reported twice.

AUC is the share of the other candidates below the target, a tied one counting half (Mann-Whitney).
A target that cannot be ranked (not in the catalogue, or excluded) is a miss in every metric; its user is still counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvrec_core.errors import MVRecError

CUTOFFS = (1, 5, 10, 20)
NAMES = tuple(f"{metric}@{k}" for metric in ("HR", "NDCG", "MRR") for k in CUTOFFS) + ("AUC",)


@dataclass(frozen=True)
class Ranks:
    """Where the target of each of B users stands among that user's candidates.

    above:  float64 [B], candidates scored above the target; inf where the target cannot be ranked
    tied:   int64 [B], other candidates with exactly the target's score
    others: int64 [B], all candidates but the target
    """

    above: np.ndarray
    tied: np.ndarray
    others: np.ndarray

    def __len__(self) -> int:
        return len(self.above)

    def __getitem__(self, users: np.ndarray | slice) -> Ranks:
        """The ranks of some users, by a slice, a bool mask or indices: a segment."""
        return Ranks(self.above[users], self.tied[users], self.others[users])

    @property
    def expected(self) -> np.ndarray:
        """float64 [B]: the mean position over all orders of ties, from 1; inf for a miss."""
        return 1 + self.above + self.tied / 2

    @staticmethod
    def concatenate(parts: Iterable[Ranks]) -> Ranks:
        """The users of all parts, in their order."""
        parts = list(parts)
        if not parts:
            return Ranks(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
        return Ranks(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("above", "tied", "others")))


def ranks(
    scores: Tensor | np.ndarray,
    target: Tensor | np.ndarray | Sequence[int],
    excluded: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
) -> Ranks:
    """Rank each user's target among all items that are not excluded.

    scores:   [B, N], higher is better; infinities are ordinary scores
    target:   [B], a column of scores, or negative where the target is not in the catalogue
    excluded: bool [B, N] with True for an item that is not a candidate, or B lists of columns, or None

    Raises MVRecError for a score that is not a number, ValueError for shapes that do not fit together.
    """
    scores_BN = torch.as_tensor(scores)
    target_B = torch.as_tensor(target, dtype=torch.int64, device=scores_BN.device)
    if scores_BN.ndim != 2 or target_B.shape != scores_BN.shape[:1]:
        raise ValueError(f"expected scores [B, N] and target [B], found {[*scores_BN.shape]} and {[*target_B.shape]}")
    if target_B.numel() and int(target_B.max()) >= scores_BN.shape[1]:
        raise ValueError(f"expected targets below {scores_BN.shape[1]}, found {int(target_B.max())}")
    _refuse_nan(scores_BN)
    candidate_BN = ~_exclusion(excluded, scores_BN)

    row_B1, column_B1 = torch.arange(len(target_B), device=target_B.device)[:, None], target_B.clamp(min=0)[:, None]
    rankable_B = (target_B >= 0) & candidate_BN[row_B1, column_B1][:, 0]
    candidate_BN[row_B1, column_B1] &= ~rankable_B[:, None]  # the target is not one of the others
    score_B1 = scores_BN[row_B1, column_B1]
    above_B = ((scores_BN > score_B1) & candidate_BN).sum(1).double().masked_fill(~rankable_B, torch.inf)
    tied_B = ((scores_BN == score_B1) & candidate_BN).sum(1).masked_fill(~rankable_B, 0)
    return Ranks(above_B.cpu().numpy(), tied_B.cpu().numpy(), candidate_BN.sum(1).cpu().numpy())


def _refuse_nan(scores_BN: Tensor) -> None:
    bad_BN = torch.isnan(scores_BN)
    if bad_BN.any():
        row, column = bad_BN.nonzero()[0].tolist()
        raise MVRecError(f"scores: expected numbers to rank by, found NaN for user row {row}, item column {column}")


def _exclusion(excluded: Tensor | np.ndarray | Sequence[Sequence[int]] | None, scores_BN: Tensor) -> Tensor:
    """bool [B, N], not shared with the caller's."""
    mask_BN = torch.zeros(scores_BN.shape, dtype=torch.bool, device=scores_BN.device)
    if excluded is None:
        return mask_BN
    if isinstance(excluded, (Tensor, np.ndarray)):
        given_BN = torch.as_tensor(excluded, device=scores_BN.device)
        if given_BN.dtype != torch.bool or given_BN.shape != scores_BN.shape:
            raise ValueError(f"expected excluded bool {[*scores_BN.shape]}, found {given_BN.dtype} {[*given_BN.shape]}")
        return mask_BN | given_BN
    if len(excluded) != len(scores_BN):
        raise ValueError(f"expected {len(scores_BN)} lists of excluded columns, found {len(excluded)}")
    rows = [row for row, columns in enumerate(excluded) for _ in columns]
    mask_BN[rows, [int(column) for columns in excluded for column in columns]] = True
    return mask_BN


def per_user(ranked: Ranks) -> np.ndarray:
    """float64 [B, len(NAMES)]: every metric of every user, columns in the order of NAMES."""
    position = np.arange(1, max(CUTOFFS) + 1)
    columns = []
    for gain in (np.ones(len(position)), 1 / np.log2(position + 1), 1 / position):
        total = np.concatenate([[0.0], np.cumsum(gain)])  # total[r]: gain of the positions 1 .. r
        for k in CUTOFFS:
            first = np.minimum(ranked.above, k).astype(np.int64)
            last = np.minimum(ranked.above + ranked.tied + 1, k).astype(np.int64)
            columns.append((total[last] - total[first]) / (ranked.tied + 1))
    return np.stack([*columns, _auc(ranked)], axis=1)


def _auc(ranked: Ranks) -> np.ndarray:
    below = ranked.others - ranked.above - ranked.tied / 2
    share = np.divide(below, ranked.others, out=np.full(len(ranked), 0.5), where=ranked.others > 0)
    return np.where(np.isinf(ranked.above), 0.0, share)  # a target with nobody to beat says nothing: 0.5


@dataclass(frozen=True)
class RankingSums:
    """What a set of users adds to the metrics. Sums of disjoint sets add up to the sums of their union.

    users:      users counted, misses included
    unrankable: of those, users whose target is not in the catalogue or is excluded
    sums:       a sum over users for each of NAMES
    """

    users: int = 0
    unrankable: int = 0
    sums: tuple[float, ...] = (0.0,) * len(NAMES)

    @staticmethod
    def from_ranks(ranked: Ranks) -> RankingSums:
        sums = per_user(ranked).sum(axis=0)
        return RankingSums(len(ranked), int(np.isinf(ranked.above).sum()), tuple(sums.tolist()))

    def __add__(self, other: RankingSums) -> RankingSums:
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return RankingSums(self.users + other.users, self.unrankable + other.unrankable, sums)

    def as_vector(self) -> Tensor:
        """float64 [2 + len(NAMES)]: add these over workers (all-reduce), then from_vector."""
        return torch.tensor([self.users, self.unrankable, *self.sums], dtype=torch.float64)

    @staticmethod
    def from_vector(vector: Tensor) -> RankingSums:
        users, unrankable, *sums = vector.tolist()
        return RankingSums(round(users), round(unrankable), tuple(sums))

    def means(self) -> dict[str, float]:
        """{"HR@1": ..., ..., "AUC": ...}, the mean over users; empty without users, as there is nothing to average."""
        return {name: total / self.users for name, total in zip(NAMES, self.sums, strict=True)} if self.users else {}


def bootstrap(ranked: Ranks, seed: int, samples: int = 1000, level: float = 0.95) -> dict[str, list[float]]:
    """Percentile bootstrap over users (Efron 1979): {"HR@10": [low, high], ...}; empty without users.

    Users are put in an order of their values first, so the interval does not depend on how they were shared out.
    """
    if not len(ranked):
        return {}
    values = per_user(ranked)
    values = values[np.lexsort(values.T)]
    generator, n = np.random.default_rng(seed), len(values)
    draws = (np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(samples))
    means = np.stack([draw @ values for draw in draws]) / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(NAMES, low, high, strict=True)}
