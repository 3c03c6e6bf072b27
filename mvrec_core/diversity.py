"""A list of candidates that are good and unlike each other, with at most so many of a kind.

Shapes: C candidates, D dimensions, M values a candidate, k places in the list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Cap = tuple[np.ndarray, int]  # values int64 [C, M] from 1, padded with 0, and how often one may be in the list


def pick(score_C: np.ndarray, vectors_CD: np.ndarray, k: int, diversity: float, caps: Sequence[Cap] = ()) -> np.ndarray:
    """int64, places of at most k candidates in the order of the list: the next one is always that with the highest

        (1 - diversity) z_j - diversity max over the chosen i of <v_i, v_j>

    among those that no cap forbids: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998), with z the scores
    at mean 0 and deviation 1, so that one value of `diversity` means the same for every model and user. Where values
    are equal the earlier candidate comes. Without diversity that is the order of the scores. A candidate of several
    values counts for each of them.
    """
    relevance_C = _standardised(score_C.astype(np.float64))
    nearest_C = np.zeros(len(score_C))
    open_C = np.ones(len(score_C), bool)
    counts = [np.zeros(int(values.max(initial=0)) + 1, np.int64) for values, _ in caps]
    chosen: list[int] = []
    while len(chosen) < k and open_C.any():
        value_C = (1 - diversity) * relevance_C - diversity * nearest_C
        place = int(np.where(open_C, value_C, -np.inf).argmax())
        open_C[place] = False
        for (values_CM, most), count in zip(caps, counts, strict=True):
            count[np.unique(values_CM[place])] += 1
            count[0] = 0  # no value
            if (count >= most).any():
                open_C &= ~(count >= most)[values_CM].any(1)
        if diversity:
            near_C = (vectors_CD @ vectors_CD[place]).astype(np.float64)
            nearest_C = np.maximum(nearest_C, near_C) if chosen else near_C
        chosen.append(place)
    return np.array(chosen, np.int64)


def _standardised(score_C: np.ndarray) -> np.ndarray:
    spread = score_C.std() if len(score_C) else 0.0
    return (score_C - score_C.mean()) / spread if spread > 0 else np.zeros(len(score_C))
