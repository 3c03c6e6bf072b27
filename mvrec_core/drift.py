"""How far what is served has moved from what the model gave on validation users: the population stability index.

    PSI = sum over bins b of (a_b - e_b) ln(a_b / e_b)

e_b is the reference's share of bin b, a_b that of the values seen lately; bins end at the reference's deciles. Below
0.1 is usually read as no change, above 0.25 as one to act on (Siddiqi, Credit Risk Scorecards, 2006). Of n values from
the reference itself about 9 / n is to be expected.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

DIGITS = 4  # of a value: sums are rounded by the size of a batch, and a constant should stay in its bin
LEAST_SHARE = 1e-4  # of an empty bin, whose logarithm would be infinite
RECENT = 5000  # values that the index is of
LEAST_RECENT = 500  # below it the index would be noise


@dataclass(frozen=True)
class Bins:
    """edges: ascending, deciles without repeats; shares: of the reference, one more than edges, which sum to 1"""

    edges: Sequence[float]
    shares: Sequence[float]

    @staticmethod
    def of(values: Sequence[float] | np.ndarray) -> Bins:
        """Of the reference's values, of which there is one at least."""
        rounded = np.round(np.asarray(values, np.float64), DIGITS)
        edges = np.unique(np.quantile(rounded, np.arange(0.1, 1.0, 0.1), method="lower"))
        counts = np.bincount(np.searchsorted(edges, rounded, side="right"), minlength=len(edges) + 1)
        return Bins(edges.tolist(), (counts / len(rounded)).tolist())

    def place(self, value: float) -> int:
        return int(np.searchsorted(self.edges, round(value, DIGITS), side="right"))

    def psi(self, places: Sequence[int]) -> float:
        """The index of values that are in these bins."""
        counts = np.bincount(np.asarray(places, np.int64), minlength=len(self.shares))
        seen = np.maximum(counts / len(places), LEAST_SHARE)
        expected = np.maximum(self.shares, LEAST_SHARE)
        return float(((seen - expected) * np.log(seen / expected)).sum())


@dataclass(frozen=True)
class Reference:
    """What a model gave on validation users.

    users:   how many
    scores:  of the best item of each that was not in the history: "score" where the model is not told when it is asked,
             "score_at_now" where it is
    weights: by view, each user's mean weight over the steps
    """

    users: int
    scores: dict[str, Bins]
    weights: dict[str, Bins]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Reference:
        tree = json.loads(path.read_text(encoding="utf-8"))
        read = ({name: Bins(**bins) for name, bins in tree[part].items()} for part in ("scores", "weights"))
        return Reference(tree["users"], *read)


class Recent:
    """The newest RECENT values of one kind, as places in the reference's bins."""

    def __init__(self, bins: Bins):
        self.bins = bins
        self._places: deque[int] = deque(maxlen=RECENT)

    def add(self, value: float) -> None:
        self._places.append(self.bins.place(value))

    def psi(self) -> float | None:
        """None where there are too few."""
        places = list(self._places)
        return self.bins.psi(places) if len(places) >= LEAST_RECENT else None
