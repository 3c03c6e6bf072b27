"""Users' histories as flat arrays, and the examples that training and evaluation take from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from mvrec_core.catalog import Vocabulary
from mvrec_core.config import Config
from mvrec_core.features import MISSING_TIME, Fitted

TRAIN, VALID, TEST = 0, 1, 2
STAGES = {"valid": VALID, "test": TEST}


@dataclass(frozen=True)
class Histories:
    """U users' events in sequence order, one after the other: user u's are rows offsets[u] .. offsets[u + 1] - 1 of E.

    user_ids: string [U]           offsets: int64 [U + 1]
    item:     int64 [E]            catalogue indices, UNKNOWN for an id that is not in the catalogue
    time:     int64 [E]            microseconds since 1970 UTC, or MISSING_TIME
    split:    int8 [E]             TRAIN, VALID or TEST
    event:    {view: [E, ...]}     event-level views as Fitted.encode gives them
    user:     {view: [U, ...]}     user-level views, likewise
    now:      int64 [U]            microseconds, when what comes after the last event is asked for, or MISSING_TIME
    """

    user_ids: pa.Array
    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    split: np.ndarray
    event: Mapping[str, np.ndarray]
    user: Mapping[str, np.ndarray]
    now: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def from_table(table: pa.Table, config: Config, items: Vocabulary, fitted: Fitted) -> Histories:
        """A row a user: user_id; lists item, timestamp, split, "event.<view>"; and "user.<view>"."""
        table = table.combine_chunks()
        lists = table["item"].combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))]).astype(
            np.int64
        )
        times = table["timestamp"].combine_chunks().flatten()
        return Histories(
            user_ids=table["user_id"].combine_chunks(),
            offsets=offsets,
            item=items.index(lists.flatten()),
            time=times.fill_null(int(MISSING_TIME)).to_numpy(zero_copy_only=False),
            split=table["split"].combine_chunks().flatten().to_numpy(zero_copy_only=False),
            event={
                name: fitted.encode(name, view, table[f"event.{name}"].combine_chunks().flatten())
                for name, view in config.views_at("event").items()
            },
            user={
                name: fitted.encode(name, view, table[f"user.{name}"]) for name, view in config.views_at("user").items()
            },
            now=np.full(len(table), MISSING_TIME),
        )

    def before(self, split: int) -> Histories:
        """The same users with their events of the splits below `split` alone."""
        kept = self.split < split
        running = np.concatenate([[0], np.cumsum(kept)])
        return replace(
            self,
            offsets=running[self.offsets],
            item=self.item[kept],
            time=self.time[kept],
            split=self.split[kept],
            event={name: values[kept] for name, values in self.event.items()},
        )

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """The times of each two neighbouring events of a user, int64 [n] of the earlier and of the later."""
        inside = np.ones(max(0, len(self.time) - 1), bool)
        ends = self.offsets[1:-1] - 1
        inside[ends[(ends >= 0) & (ends < len(inside))]] = False
        return self.time[:-1][inside], self.time[1:][inside]

    def targets(self, examples: Examples) -> np.ndarray:
        """The items of the targets of some windows, int64 [P]."""
        count = examples.limit - examples.first
        begin = self.offsets[examples.user] + examples.first
        return self.item[np.repeat(begin - np.cumsum(count) + count, count) + np.arange(count.sum())]

    def events_of(self, user: int, stop: int | None = None) -> slice:
        """The rows of a user's first `stop` events, or of all."""
        start = int(self.offsets[user])
        return slice(start, int(self.offsets[user + 1]) if stop is None else start + stop)


@dataclass(frozen=True)
class Examples:
    """n windows of histories: the encoder reads events start .. stop - 1 of a user (positions in the history).

    user, start, stop: int64 [n]
    first, limit:      int64 [n], events first .. limit - 1 are the targets; each is predicted from those before it
    """

    user: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    limit: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows: np.ndarray | slice) -> Examples:
        return Examples(*(getattr(self, field.name)[rows] for field in fields(self)))

    def padded(self, count: int) -> Examples:
        """These, and behind them empty windows without a target, `count` in all."""
        return Examples(*(np.pad(getattr(self, field.name), (0, count - len(self))) for field in fields(self)))


def train_examples(
    histories: Histories, max_len: int, draw: np.random.Generator | None = None, before: int = VALID
) -> Examples:
    """Every event of a split below `before` as a target once, in windows of at most max_len targets; the oldest starts
    from the profile.

    Windows are cut from the newest event back. With `draw`, histories of several windows are cut at random places
    instead, so that windows differ from epoch to epoch.
    """
    count = _count_before(histories, before)
    shift = (
        np.zeros_like(count) if draw is None else np.where(count > max_len, draw.integers(0, max_len, len(count)), 0)
    )
    windows = -(-(count + shift) // max_len)
    user = np.repeat(np.arange(len(histories)), windows)
    back = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)  # 0: the newest window
    end = count[user] + shift[user] - back * max_len
    first, limit = np.maximum(end - max_len, 0), np.minimum(end, count[user])
    return Examples(user, np.maximum(first - 1, 0), limit - 1, first, limit)


def stage_examples(histories: Histories, stage: str, max_len: int) -> Examples:
    """Of each user with an event in the stage ("valid" or "test"): everything before the first such event is read,
    and that event is the target."""
    before = _count_before(histories, STAGES[stage])
    total = np.diff(histories.offsets)
    user = np.flatnonzero(before < total)
    user = user[histories.split[histories.offsets[user] + before[user]] == STAGES[stage]]
    stop = before[user]
    return Examples(user, np.maximum(stop - max_len, 0), stop, stop, stop + 1)


def live_examples(histories: Histories, max_len: int) -> Examples:
    """Of each user: the newest max_len events are read, with no target."""
    stop = np.diff(histories.offsets)
    return Examples(np.arange(len(histories)), np.maximum(stop - max_len, 0), stop, stop, stop)


def _count_before(histories: Histories, split: int) -> np.ndarray:
    """int64 [U]: a user's events before the first of the split or a later one."""
    running = np.concatenate([[0], np.cumsum(histories.split < split)])
    return running[histories.offsets[1:]] - running[histories.offsets[:-1]]
