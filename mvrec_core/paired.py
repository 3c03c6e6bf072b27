"""Whether two models differ on the same users: differences with intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 256  # samples drawn together


@dataclass(frozen=True)
class Difference:
    """Of one metric, a mean over users: first - second.

    low, high: the paired bootstrap interval of the difference
    p:         two-sided, of a difference as large if it did not matter which model is which
    """

    first: float
    second: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        return self.first - self.second


def compare(
    first: np.ndarray,
    second: np.ndarray,
    names: Sequence[str],
    seed: int = 0,
    samples: int = 5000,
    level: float = 0.95,
) -> dict[str, Difference]:
    """{name: Difference} of float64 [U, M]: M metrics of the same U users in the same order, under two models.

    The interval is the percentile bootstrap over users' differences (Efron 1979), so users stay paired. The p-value is
    Fisher's randomisation test, by random signs of the differences, (1 + samples as extreme) / (1 + samples) (Smucker,
    Allan and Carterette, CIKM 2007; Phipson and Smyth 2010): at least 1 / (1 + samples), and of one metric alone, so
    those who look at many should ask for less. Raises ValueError for shapes that differ, or no users.
    """
    if first.shape != second.shape or first.shape[1:] != (len(names),) or not len(first):
        raise ValueError(f"expected two [users, {len(names)}], found {first.shape} and {second.shape}")
    difference_UM = first - second
    users, generator = len(first), np.random.default_rng(seed)
    mean_M = difference_UM.mean(0)
    extreme_M, means = np.zeros(len(names), np.int64), []
    for start in range(0, samples, CHUNK):
        size = min(CHUNK, samples - start)
        draw_SU = generator.integers(users, size=(size, users))
        count_SU = np.stack([np.bincount(draw_U, minlength=users) for draw_U in draw_SU])
        means.append(count_SU @ difference_UM / users)
        sign_SU = generator.integers(2, size=(size, users), dtype=np.int8) * 2.0 - 1
        flipped_SM = sign_SU @ difference_UM / users
        extreme_M += (np.abs(flipped_SM) >= np.abs(mean_M) - 1e-12).sum(0)
    low_M, high_M = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        name: Difference(
            first=float(first[:, m].mean()),
            second=float(second[:, m].mean()),
            low=float(low_M[m]),
            high=float(high_M[m]),
            p=float((1 + extreme_M[m]) / (1 + samples)),
        )
        for m, name in enumerate(names)
    }
