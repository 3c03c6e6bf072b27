"""What a caller asks with: a user, events and candidates as raw values, and how the model comes to see them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from mvrec_core.attributes import Condition
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import RequestError
from mvrec_core.features import MISSING_TIME, Fitted
from mvrec_core.schema import read_value, read_vectors
from mvrec_core.sequences import TRAIN, Histories
from mvrec_core.views import CategoryView, NumberView, TextView, VectorView

MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Event:
    """One event of a request; timestamp in Unix seconds, values by event-level column (such as "rating")."""

    item_id: str
    timestamp: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A known user, a list of events, or both: then the events follow the stored history.

    now: "clock": when it is read, see Recommender.moment; None: the model is not told
    allow: the only items that may come, None for all; deny wins over it
    where: conditions on items, all of which have to hold
    diversity: 0 .. 1, how much unlikeness to the items before it counts against an item's score
    caps: category views, and how many items of one value a list may hold
    """

    user_id: str | None = None
    events: tuple[Event, ...] = ()
    k: int = 10
    exclude_seen: bool | None = None  # None: as evaluate.exclude_seen has it
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    where: tuple[Condition, ...] = ()
    diversity: float = 0.0
    caps: tuple[tuple[str, int], ...] = ()
    explain: bool = False
    now: float | Literal["clock"] | None = None  # when it is asked, in Unix seconds, for models with a time view
    live: tuple[Event, ...] = ()  # what the service has heard of the user: after the stored history, before `events`
    model_version: str | None = None  # of the versions that a service has, the one that is to answer


@dataclass(frozen=True)
class Candidate:
    """An item of the catalogue by its id, or a new one by its raw columns."""

    item_id: str | None = None
    features: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Item:
    """An item to be added to the catalogue or changed, by its raw columns; to be removed where they are None."""

    item_id: str
    features: Mapping[str, Any] | None = None
    display: str | None = None  # None: the first of the text's columns


def read_events(config: Config, data: Data, events: Sequence[Sequence[Event]]) -> Histories:
    """The events of n requests as n histories without profiles. Raises RequestError naming the column."""
    flat = [event for history in events for event in history]
    time = microseconds([event.timestamp for event in flat])
    encoded = {}
    for name, view in config.views_at("event").items():
        if not isinstance(view, (CategoryView, NumberView)):
            encoded[name] = time
        else:
            raw = [event.values.get(view.column) for event in flat]
            encoded[name] = data.fitted.encode(name, view, _raw_values(view, raw, "events"))
    return Histories(
        user_ids=pa.nulls(len(events), pa.string()),
        offsets=np.concatenate([[0], np.cumsum([len(history) for history in events])]).astype(np.int64),
        item=data.catalog.ids.index([event.item_id for event in flat]),
        time=time,
        split=np.full(len(flat), TRAIN, np.int8),
        event=encoded,
        user={},
        now=np.full(len(events), MISSING_TIME),
    )


def digest(*parts: Any) -> bytes:
    """16 bytes that are the same in every process for equal parts: plain values, sets, and the dataclasses above."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=_plain).encode("ascii"), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return vars(value) if is_dataclass(value) else repr(value)


def microseconds(seconds: Sequence[float | None]) -> np.ndarray:
    """int64 [n], MISSING_TIME for None."""
    return np.array([MISSING_TIME if s is None else round(s * MICROSECONDS) for s in seconds], np.int64)


def continued(stored: Histories, rows: Sequence[int], fresh: Histories) -> Histories:
    """For each of n requests the stored events and profile of a row (-1: there is none), then its fresh events."""
    empty = slice(0, 0)
    cuts = [(stored.events_of(row) if row >= 0 else empty, fresh.events_of(b)) for b, row in enumerate(rows)]

    def joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        if old.ndim == 2:
            width = max(old.shape[1], new.shape[1])
            old, new = (np.pad(values, ((0, 0), (0, width - values.shape[1]))) for values in (old, new))
        return np.concatenate([part for a, b in cuts for part in (old[a], new[b])])

    sizes = [(a.stop - a.start) + (b.stop - b.start) for a, b in cuts]
    return Histories(
        user_ids=pa.array([stored.user_ids[row].as_py() if row >= 0 else None for row in rows], pa.string()),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        item=joined(stored.item, fresh.item),
        time=joined(stored.time, fresh.time),
        split=joined(stored.split, fresh.split),
        event={name: joined(values, fresh.event[name]) for name, values in stored.event.items()},
        user={name: _profiles(values, rows) for name, values in stored.user.items()},
        now=np.full(len(rows), MISSING_TIME),
    )


def _profiles(values: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    missing = np.nan if values.dtype.kind == "f" else 0
    there = np.array([row >= 0 for row in rows]).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(there, values[[max(row, 0) for row in rows]], np.asarray(missing, values.dtype))


def read_features(
    config: Config, fitted: Fitted, rows: Sequence[Mapping[str, Any]], where: str = "candidates"
) -> tuple[pa.Table, list[str | None]]:
    """New items' raw columns as the table that model.item_features reads, and their texts. Raises RequestError, which
    calls the rows `where`."""
    columns: dict[str, pa.Array] = {}
    texts: list[str | None] = [None] * len(rows)
    for name, view in config.views_at("item").items():
        if isinstance(view, TextView):
            texts = read_texts(rows, view)
        elif isinstance(view, (CategoryView, NumberView)):
            columns[name] = _raw_values(view, [row.get(view.column) for row in rows], where)
        elif isinstance(view, VectorView):
            size = len(fitted.vectors[name][0])
            columns[name] = _raw_vectors(view, [row.get(view.column) for row in rows], size, where)
    return pa.table(columns or {"none": pa.nulls(len(rows))}), texts


def read_texts(rows: Sequence[Mapping[str, Any]], view: TextView) -> list[str | None]:
    """ "title: ... genres: ...", as prepare writes it; None where every column is missing or blank."""

    def cell(value: Any) -> str | None:
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else None if value is None else str(value)

    cells = {name: [cell(row.get(name)) for row in rows] for name in view.columns}
    return read_value(pl.DataFrame(cells, schema=dict.fromkeys(view.columns, pl.String)), view).to_list()


def _raw_values(view: CategoryView | NumberView, raw: Sequence[Any], where: str) -> pa.Array:
    """Values of a request as prepare would have stored them. Raises RequestError naming the column."""
    if isinstance(view, NumberView):
        return pa.array([_number(value, view.column, where) for value in raw], pa.float64())
    lists: list[list[str] | None] = []
    for value in raw:
        if value is None:
            lists.append(None)
        elif isinstance(value, (list, tuple)):
            lists.append([str(part) for part in value])
        else:
            parts = str(value).split(view.separator) if view.separator else [str(value)]
            lists.append([part.strip() for part in parts if part.strip()])
    return pa.array(lists, pa.list_(pa.string()))


def _raw_vectors(view: VectorView, raw: Sequence[Any], size: int, where: str) -> pa.Array:
    """float32 [n] lists of `size`, null where there is none. Raises RequestError naming the column."""
    cells = [value if value is None or isinstance(value, list) else str(value).split(view.separator) for value in raw]
    texts = [None if cell is None else [str(part) for part in cell] for cell in cells]
    vectors, problem, _ = read_vectors(pl.Series(texts, dtype=pl.List(pl.String)), view, size)
    if problem is not None:
        raise RequestError(f"{where}: '{view.column}': {problem}", view.column)
    return vectors.to_arrow().cast(pa.list_(pa.float32()))


def _number(value: Any, column: str, where: str) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{where}: '{column}': expected a number, found {value!r:.60}", column) from None
