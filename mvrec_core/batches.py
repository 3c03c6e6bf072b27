"""The batches of an epoch: which windows each holds, and each worker's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvrec_core.sequences import Examples
from mvrec_core.workers import Workers


@dataclass(frozen=True)
class Rows:
    """One batch: the examples of all workers, and this worker's; fold: of their users, where all are of one."""

    all: np.ndarray
    mine: np.ndarray
    workers: int
    fold: int | None = None

    def share(self, examples: Examples, part: np.ndarray) -> float:
        """The weight that the mean loss of a part needs, so that the sum over a worker's parts and the average over the
        workers is the mean over the whole batch."""
        targets = examples.limit - examples.first
        return float(targets[part].sum() * self.workers / targets[self.all].sum())


def epoch_batches(
    examples: Examples, batch_size: int, seed: Sequence[int], workers: Workers, fold: np.ndarray | None = None
) -> list[Rows]:
    """The batches of a shard, each window in one of them. Windows of a like length stand together, so padding is
    little. A batch has batch_size windows, that of the shortest ones what is over besides: so every worker has a part
    of each, batches do not depend on the number of workers, and their shapes are few, as in batch.rounded.

    fold: int64 [n], of each window's user: a batch has windows of one. Folds that do not fill a batch stand together,
    as of no fold; where they do not fill one together either, with the largest.
    """
    draw = np.random.default_rng(seed)
    length = examples.limit - examples.start
    order = np.argsort(length * draw.uniform(0.9, 1.1, len(length)), kind="stable")
    batches = [
        (part, number)
        for number, members in _groups(fold, len(order), batch_size).items()
        for part in _cut(order[members[order]], batch_size)
    ]
    places = draw.permutation(len(batches))
    return [
        Rows(part, part[workers.rank :: workers.size], workers.size, number)
        for part, number in map(batches.__getitem__, places)
    ]


def _groups(fold: np.ndarray | None, windows: int, batch_size: int) -> dict[int | None, np.ndarray]:
    """bool [n] of each fold: its windows; None for those of no fold."""
    if fold is None:
        return {None: np.ones(windows, bool)}
    counts = np.bincount(fold)
    found: dict[int | None, np.ndarray] = {
        number: fold == number for number in np.flatnonzero(counts >= batch_size).tolist()
    }
    rest = ~np.any([*found.values(), np.zeros(windows, bool)], axis=0)
    if not rest.any():
        return found
    if found and rest.sum() < batch_size:
        largest = int(counts.argmax())
        return found | {largest: found[largest] | rest}
    return found | {None: rest}


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    count = max(1, len(order) // batch_size)
    return np.split(order, len(order) - batch_size * np.arange(count - 1, 0, -1))
