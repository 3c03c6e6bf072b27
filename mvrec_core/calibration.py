"""How far the probability sigmoid(s) can be believed. Sums that add up over batches and workers.

What is calibrated: a pair of a user and a candidate (an item that may be recommended to that user) of a stage. The
prediction p = sigmoid(s) is that this item is the user's next one, the outcome y whether it is. One candidate of a
user at most has y = 1, so nearly all pairs have p near 0 and are easily right; the pairs of each user's top-k list,
where p is large enough to be wrong, are the harder and more telling set.

The expected calibration error is sum over bins of n_b / n |mean p - mean y| (Naeini, Cooper and Hauskrecht, AAAI 2015)
with bins of equal mass (Nguyen and O'Connor, EMNLP 2015), as equal widths would put all pairs in one bin.
Pairs are counted by score in CELLS narrow cells, and neighbouring cells are joined to bins of about n / BINS
pairs, so a batch is forgotten at once. The border of a bin is therefore that of a cell, 1 / 64 wide in s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from scipy.special import expit
from torch import Tensor

from mvrec_core.errors import MVRecError

LOWEST, PER_UNIT, CELLS = -40, 64, 5120  # cells of s from -40 to 40; sigmoid(-40) is 4e-18
BINS = 15
LEAST_HITS = 30  # that say anything of a share
STEEPNESS = (0.05, 20.0)  # the least and the most of a fit


@dataclass(frozen=True)
class Scaling:
    """What makes scores s of a trained model those of its checkpoint: a s + c. Of an item that is new, whose id says
    nothing, the cosine in s counts `certainty` times."""

    a: float = 1.0
    c: float = 0.0
    certainty: float = 1.0


@dataclass(frozen=True)
class CalibrationSums:
    """Per cell of s: pairs (int64), the sum of p (float64) and of y (int64), each [CELLS]. Sums of disjoint sets of
    pairs add up to the sums of their union."""

    pairs: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray

    @staticmethod
    def empty() -> CalibrationSums:
        return CalibrationSums(np.zeros(CELLS, np.int64), np.zeros(CELLS), np.zeros(CELLS, np.int64))

    @staticmethod
    def of(scores: Tensor, outcome: Tensor) -> CalibrationSums:
        """scores: float [n] of any pairs; outcome: bool [n]. Raises MVRecError for a score that is not a number."""
        if torch.isnan(scores).any():
            raise MVRecError(f"scores: expected numbers, found NaN for pair {int(torch.isnan(scores).nonzero()[0])}")
        scores = scores.double()
        cell = ((scores - LOWEST) * PER_UNIT).clamp(0, CELLS - 1).long()
        return CalibrationSums(
            torch.bincount(cell, minlength=CELLS).cpu().numpy(),
            torch.bincount(cell, scores.sigmoid(), minlength=CELLS).cpu().numpy(),
            torch.bincount(cell[outcome], minlength=CELLS).cpu().numpy(),
        )

    def __add__(self, other: CalibrationSums) -> CalibrationSums:
        return CalibrationSums(
            self.pairs + other.pairs, self.predicted + other.predicted, self.observed + other.observed
        )

    def bins(self) -> list[tuple[float, float, int]]:
        """Reliability: (mean p, share of y = 1, pairs) of each bin from the lowest score up; BINS or fewer."""
        total = int(self.pairs.sum())
        if not total:
            return []
        upto = np.cumsum(self.pairs)
        bin_of = np.maximum(upto - 1, 0) * BINS // total  # by the last pair of a cell
        pairs, predicted, observed = (
            np.bincount(bin_of, values, BINS) for values in (self.pairs, self.predicted, self.observed)
        )
        return [
            (float(p / n), float(y / n), int(n)) for n, p, y in zip(pairs, predicted, observed, strict=True) if n > 0
        ]

    def scaling(self, steepness: tuple[float, float] = STEEPNESS) -> tuple[float, float]:
        """a and c with which sigmoid(a s + c) fits the outcomes best, by likelihood (Platt, "Probabilistic outputs for
        support vector machines", 1999), with a between two numbers; 1 and 0 where there is nothing to fit."""
        there = self.pairs > 0
        pairs, hits = self.pairs[there].astype(np.float64), self.observed[there].astype(np.float64)
        if not 0 < hits.sum() < pairs.sum():
            return 1.0, 0.0
        score = LOWEST + (np.flatnonzero(there) + 0.5) / PER_UNIT

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            logit = values[0] * score + values[1]
            excess = pairs * expit(logit) - hits
            total = (pairs * np.logaddexp(0, logit) - hits * logit).sum()
            return total / hits.sum(), np.array([(excess * score).sum(), excess.sum()]) / hits.sum()

        found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[steepness, (None, None)])
        return float(found.x[0]), float(found.x[1])

    def certainty(self, bias: float) -> float:
        """The share g of s - bias, 0 to 1, with which the sum of sigmoid(bias + g (s - bias)) is that of the outcomes.
        1 where it is no more without, or fewer than LEAST_HITS outcomes are true."""
        there = self.pairs > 0
        above = LOWEST + (np.flatnonzero(there) + 0.5) / PER_UNIT - bias

        def excess(share: float) -> float:
            return float((self.pairs[there] * expit(bias + share * above)).sum() - self.observed.sum())

        if self.observed.sum() < LEAST_HITS or excess(1.0) <= 0:
            return 1.0
        return float(brentq(excess, 0.0, 1.0, xtol=1e-6)) if excess(0.0) < 0 else 0.0

    def error(self) -> float | None:
        """The expected calibration error, 0 to 1; None without pairs."""
        bins, total = self.bins(), int(self.pairs.sum())
        return sum(n * abs(p - y) for p, y, n in bins) / total if total else None
