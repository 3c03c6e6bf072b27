"""Histories read a shard of whole users at a time, since more may be stored than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mvrec_core.sequences import Histories


@dataclass(frozen=True)
class Shards:
    """Users are stored in parts; a shard is as many parts as `at_once` events allow.

    events:  of each part, how many it stores
    read:    the histories of the parts with these numbers, in this order
    at_once: events of a shard; one part may have more, and the last shard may have half as many again
    """

    events: Sequence[int]
    read: Callable[[tuple[int, ...]], Histories]
    at_once: int

    @staticmethod
    def whole(histories: Histories) -> Shards:
        """All in one shard that is in memory."""
        return Shards((len(histories.item),), lambda _: histories, max(1, len(histories.item)))

    def order(self, draw: np.random.Generator | None = None) -> list[tuple[int, ...]]:
        """The parts of each shard; each part comes once, with `draw` in another shard each time."""
        parts = np.arange(len(self.events)) if draw is None else draw.permutation(len(self.events))
        shards: list[list[int]] = [[]]
        left = sum(self.events)
        held = 0
        for part in parts.tolist():
            full = held > 0 and held + self.events[part] > self.at_once
            if full and left > self.at_once // 2:  # what is left makes a shard of its own
                shards.append([])
                held = 0
            shards[-1].append(part)
            held += self.events[part]
            left -= self.events[part]
        return [tuple(sorted(shard)) for shard in shards if shard]

    def __iter__(self) -> Iterator[Histories]:
        """All histories, shard by shard in stored order."""
        return (self.read(shard) for shard in self.order())
