"""The batches of an epoch: which windows each holds, and each worker's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvrec_core.sequences import Examples
from mvrec_core.workers import Workers


@dataclass(frozen=True)
class Rows:
    """One batch: the examples of all workers, and this worker's."""

    all: np.ndarray
    mine: np.ndarray
    workers: int

    def share(self, examples: Examples, part: np.ndarray) -> float:
        """The weight that the mean loss of a part needs, so that the sum over a worker's parts and the average over the
        workers is the mean over the whole batch."""
        targets = examples.limit - examples.first
        return float(targets[part].sum() * self.workers / targets[self.all].sum())


def epoch_batches(examples: Examples, batch_size: int, seed: Sequence[int], workers: Workers) -> list[Rows]:
    """The batches of a shard, each window in one of them. Windows of a like length stand together, so padding is
    little. A batch has batch_size windows, that of the shortest ones what is over besides: so every worker has a part
    of each, batches do not depend on the number of workers, and their shapes are few, as in batch.rounded."""
    draw = np.random.default_rng(seed)
    length = examples.limit - examples.start
    order = np.argsort(length * draw.uniform(0.9, 1.1, len(length)), kind="stable")
    count = max(1, len(order) // batch_size)
    batches = np.split(order, len(order) - batch_size * np.arange(count - 1, 0, -1))
    places = draw.permutation(len(batches))
    return [Rows(batches[p], batches[p][workers.rank :: workers.size], workers.size) for p in places]
