"""The one inference path: evaluation, batch lists and serving all ask a Recommender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from mvrec_core import checkpoint, training
from mvrec_core.catalog import FIRST, UNKNOWN
from mvrec_core.config import CategoryView, Config, NumberView, TextView, VectorView
from mvrec_core.errors import RequestError
from mvrec_core.features import MISSING_TIME
from mvrec_core.index import NOTHING, top_k
from mvrec_core.metrics import Ranks
from mvrec_core.model import item_features
from mvrec_core.policy import Filter, eligible
from mvrec_core.schema import read_value, read_vectors
from mvrec_core.sequences import TRAIN, Examples, Histories, live_examples, stage_examples

MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Event:
    """One event of a request; timestamp in Unix seconds, values by event-level column (such as "rating")."""

    item_id: str
    timestamp: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A known user, a list of events, or both: then the events follow the stored history."""

    user_id: str | None = None
    events: tuple[Event, ...] = ()
    k: int = 10
    exclude_seen: bool = True
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    explain: bool = False
    now: float | None = None  # when it is asked, in Unix seconds, for models with a time view


@dataclass(frozen=True)
class Recommended:
    item_id: str
    score: float
    rank: int  # from 1
    display: str | None
    views: dict[str, float] | None  # the item's view weights, where an explanation was asked for


@dataclass(frozen=True)
class Answer:
    """rung: "history", "profile" or "popularity", what the answer rests on; unknown_items: of the request's events."""

    rung: str
    items: list[Recommended]
    unknown_items: int


@dataclass(frozen=True)
class Candidate:
    """An item of the catalogue by its id, or a new one by its raw columns."""

    item_id: str | None = None
    features: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scored:
    item_id: str | None
    score: float | None  # None where the id is unknown
    probability: float | None


@dataclass(frozen=True)
class _User:
    """A request's user as the model sees it: the whole history, and the row of the stored users or -1."""

    row: int
    known: int  # events of the history that are in the catalogue
    unknown: int  # events of the request that are not


class Recommender:
    """Reads only, so threads may share it."""

    def __init__(self, loaded: checkpoint.Checkpoint):
        self.config: Config = loaded.config
        self.model_version = loaded.model_version
        self._model = loaded.model
        self._data = loaded.data
        self._histories = loaded.data.histories(loaded.config)
        self._rows = {user_id: row for row, user_id in enumerate(self._histories.user_ids.to_pylist())}
        self._items = loaded.item_vectors
        self._device = loaded.item_vectors.device
        self._views, _ = training.catalogue(self._model)
        with torch.no_grad():
            self._weights = self._model.item_vectors(self._views)[1]
        train = self._histories.item[self._histories.split == TRAIN]
        counts = np.bincount(train, minlength=len(self._items)).astype(np.float32)
        self._popularity = torch.from_numpy(counts / max(1.0, counts.sum())).to(self._device)

    @staticmethod
    def load(directory: str | Path, device: str = "cpu") -> Recommender:
        """Raises CheckpointError for a directory that is not a whole, unchanged checkpoint."""
        return Recommender(checkpoint.load(directory, device))

    @property
    def n_items(self) -> int:
        return len(self._data.catalog)

    # requests

    def recommend(self, requests: Sequence[Request]) -> list[Answer | RequestError]:
        """An answer for each request; a bad one holds its own error and leaves the others alone."""
        answers: list[Answer | RequestError | None] = [self._refuse(request) for request in requests]
        good = [place for place, answer in enumerate(answers) if answer is None]
        for place, answer in zip(good, self._answers([requests[place] for place in good]), strict=True):
            answers[place] = answer
        return answers  # type: ignore[return-value]  # every None has been answered

    def score(self, request: Request, candidates: Sequence[Candidate]) -> tuple[str, list[Scored], int]:
        """The rung, a score and its sigmoid for each candidate, and how many ids are unknown, of events or candidates.

        With no history and no profile the score is the item's share of train events, and new items have none.
        Raises RequestError.
        """
        histories, users = self._users([request])
        rung = self._rung(users[0])
        index = self._data.catalog.ids.index([candidate.item_id or "" for candidate in candidates])
        new = [place for place, candidate in enumerate(candidates) if candidate.features is not None]
        vectors = self._items[index]
        if new:
            vectors = vectors.clone()
            vectors[new] = self._new_vectors([dict(candidates[place].features or {}) for place in new], new)
        known = (index >= FIRST) | np.isin(np.arange(len(candidates)), new)
        if rung == "popularity":
            known &= index >= FIRST
            scores = self._popularity[index]
            chances = scores
        else:
            user = training.encode(self._model, histories, live_examples(histories, self._max_len), self._views)[0]
            with torch.no_grad():
                scores = vectors @ user / self._model.tau + self._model.bias
            chances = scores.sigmoid()
        scored = [
            Scored(c.item_id, float(s) if k else None, float(p) if k else None)
            for c, k, s, p in zip(candidates, known, scores, chances, strict=True)
        ]
        strangers = sum(1 for place, i in enumerate(index) if i < FIRST and candidates[place].features is None)
        return rung, scored, users[0].unknown + strangers

    def similar(self, item_id: str, k: int) -> list[Recommended]:
        """The k items whose vectors are nearest by cosine, the item itself left out. Raises RequestError."""
        self._check_k(k)
        index = int(self._data.catalog.ids.index([item_id])[0])
        if index == UNKNOWN:
            raise RequestError(f"item_id: '{item_id}' is not in the catalogue", "item_id", 404)
        allowed = eligible([Filter(deny=[index])], len(self._items), self._device)
        found = top_k(self._items[[index]], self._items, k, allowed)
        return self._list(found.index[0].tolist(), found.score[0].tolist(), explain=False)

    def history(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        """The newest `limit` events of a stored user, newest first: item_id, display, timestamp in Unix seconds."""
        row = self._rows.get(user_id)
        if row is None:
            raise RequestError(f"user_id: '{user_id}' is not known", "user_id", 404)
        user = self._data.users.slice(row, 1)
        pairs = list(zip(user["item"][0].as_py(), user["timestamp"][0].as_py(), strict=True))[::-1][:limit]
        index = self._data.catalog.ids.index([item for item, _ in pairs])
        return [
            {"item_id": item, "display": self._display(place), "timestamp": None if t is None else t / MICROSECONDS}
            for (item, t), place in zip(pairs, index.tolist(), strict=True)
        ]

    def users(self, prefix: str, limit: int) -> list[str]:
        """Stored users whose id starts with a prefix, at most `limit`, in stored order."""
        found = []
        for user_id in self._rows:
            if user_id.startswith(prefix):
                found.append(user_id)
                if len(found) == limit:
                    break
        return found

    # evaluation and batch lists

    def rank_stage(self, stage: str) -> tuple[Examples, Ranks]:
        """The users that have a target in "valid" or "test", and where it stands among the whole catalogue."""
        examples = stage_examples(self._histories, stage, self._max_len)
        return examples, training.rank_targets(self._model, self._histories, examples, self.config)

    @torch.no_grad()
    def score_stage(self, stage: str, batch_size: int) -> Iterator[tuple[Examples, torch.Tensor]]:
        """The same users a batch at a time, and their scores of all rows of the catalogue, float32 [B, N]."""
        examples = stage_examples(self._histories, stage, self._max_len)
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            vectors = training.encode(self._model, self._histories, part, self._views)
            yield part, (vectors @ self._items.T / self._model.tau + self._model.bias).float()

    @torch.no_grad()
    def item_texts(self) -> torch.Tensor | None:
        """float [N, H]: the encoder's standardised vector of each item's text, zero where there is none; None where
        there is no text view. The encoder is the checkpoint's: a tuned one gives other vectors than a frozen one."""
        text = self._model.text
        return None if text is None else text(torch.arange(len(self._items), device=self._device))[0]

    def item_categories(self) -> dict[str, torch.Tensor]:
        """{view: int64 [N, M]}: the categories of each item, by item-level category view; PAD where there is none."""
        views = {name for name, view in self.config.views_at("item").items() if view.kind == "category"}
        features = item_features(self.config, self._data.catalog.table, self._data.fitted)
        return {name: values for name, values in features.items() if name in views}

    @property
    def item_ids(self) -> list[str]:
        """The catalogue's ids in index order."""
        return self._data.catalog.table["item_id"].to_pylist()

    def lists(self, stage: str, k: int) -> pa.Table:
        """user_id, rank (from 1), item_id, score for stored users: "test" from what came before the test event, the
        lists that the metrics are computed from; "live" from all history. Raises RequestError for a bad k."""
        self._check_k(k)
        examples = (
            live_examples(self._histories, self._max_len)
            if stage == "live"
            else stage_examples(self._histories, stage, self._max_len)
        )
        columns: dict[str, list[Any]] = {"user_id": [], "rank": [], "item_id": [], "score": []}
        for start in range(0, len(examples), self.config.evaluate.batch_size):
            part = examples[start : start + self.config.evaluate.batch_size]
            vectors = training.encode(self._model, self._histories, part, self._views)
            filters = [
                self._filter(self._histories.item[self._histories.events_of(u, s)], self.config.evaluate.exclude_seen)
                for u, s in zip(part.user, part.stop, strict=True)
            ]
            for user, (index, score) in zip(part.user.tolist(), self._best(vectors, filters, k), strict=True):
                user_id = self._histories.user_ids[user].as_py()
                for recommended in self._list(index, score, explain=False):
                    columns["user_id"].append(user_id)
                    columns["rank"].append(recommended.rank)
                    columns["item_id"].append(recommended.item_id)
                    columns["score"].append(recommended.score)
        kinds = {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}
        return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})

    @property
    def histories(self) -> Histories:
        return self._histories

    # inside

    @property
    def _max_len(self) -> int:
        return self.config.model.max_len

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.n_items:
            raise RequestError(f"k: expected 1 to {self.n_items}, the size of the catalogue, found {k}", "k")

    def _refuse(self, request: Request) -> RequestError | None:
        try:
            self._check_k(request.k)
            if request.events:
                self._encode_events([request.events])
        except RequestError as error:
            return error
        return None

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        histories, users = self._users(requests)
        examples = live_examples(histories, self._max_len)
        vectors = training.encode(self._model, histories, examples, self._views)
        filters = []
        for place, request in enumerate(requests):
            allow = None if request.allow is None else self._known(request.allow)
            seen = histories.item[histories.events_of(place)]
            filters.append(self._filter(seen, request.exclude_seen, allow, self._known(request.deny)))
        most = max(request.k for request in requests)
        by_model = self._best(vectors, filters, most)
        answers = []
        for place, (request, user) in enumerate(zip(requests, users, strict=True)):
            rung = self._rung(user)
            index, score = by_model[place]
            if rung == "popularity":
                mask = eligible([filters[place]], len(self._items), self._device)
                best = top_k(self._popularity.new_ones(1, 1), self._popularity[:, None], request.k, mask)
                index, score = best.index[0].tolist(), best.score[0].tolist()
            items = self._list(index[: request.k], score[: request.k], request.explain)
            answers.append(Answer(rung, items, user.unknown))
        return answers

    def _rung(self, user: _User) -> str:
        if user.known:
            return "history"
        has_profile = any((self._present(values[user.row])).any() for values in self._histories.user.values())
        return "profile" if user.row >= 0 and has_profile else "popularity"

    @staticmethod
    def _present(values: np.ndarray) -> np.ndarray:
        return ~np.isnan(values) if values.dtype.kind == "f" else values != 0

    def _filter(
        self, seen: np.ndarray, exclude_seen: bool, allow: np.ndarray | None = None, deny: np.ndarray | tuple = ()
    ) -> Filter:
        return Filter(seen[seen >= FIRST] if exclude_seen else (), allow, deny)

    def _known(self, ids: frozenset[str]) -> np.ndarray:
        index = self._data.catalog.ids.index(sorted(ids))
        return index[index >= FIRST]

    @torch.no_grad()
    def _best(self, vectors: torch.Tensor, filters: Sequence[Filter], k: int) -> list[tuple[list[int], list[float]]]:
        mask = eligible(filters, len(self._items), self._device)
        found = top_k(vectors, self._items, k, mask, scale=1 / self._model.tau, bias=self._model.bias)
        return list(zip(found.index.tolist(), found.score.tolist(), strict=True))

    def _list(self, index: Sequence[int], score: Sequence[float], explain: bool) -> list[Recommended]:
        ids, names = self._data.catalog.ids, self._model.item_view_names
        out = []
        for place, (row, value) in enumerate(zip(index, score, strict=True)):
            if row == NOTHING:
                break
            weights = dict(zip(names, self._weights[row].tolist(), strict=True)) if explain else None
            out.append(Recommended(ids.value(row), value, place + 1, self._display(row), weights))
        return out

    def _display(self, row: int) -> str | None:
        return self._data.catalog.display[row - FIRST] if row >= FIRST else None

    def _users(self, requests: Sequence[Request]) -> tuple[Histories, list[_User]]:
        """The requests' users as histories of their own: the stored events, then the request's."""
        fresh = self._encode_events([request.events for request in requests])
        stored = self._histories
        rows = [self._rows.get(request.user_id, -1) if request.user_id is not None else -1 for request in requests]
        empty = slice(0, 0)
        cuts = [(stored.events_of(row) if row >= 0 else empty, fresh.events_of(b)) for b, row in enumerate(rows)]

        def joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            if old.ndim == 2:
                width = max(old.shape[1], new.shape[1])
                old, new = (np.pad(values, ((0, 0), (0, width - values.shape[1]))) for values in (old, new))
            return np.concatenate([part for a, b in cuts for part in (old[a], new[b])])

        item = joined(stored.item, fresh.item)
        sizes = [(a.stop - a.start) + (b.stop - b.start) for a, b in cuts]
        histories = Histories(
            user_ids=pa.array([request.user_id for request in requests], pa.string()),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            item=item,
            time=joined(stored.time, fresh.time),
            split=joined(stored.split, fresh.split),
            event={name: joined(values, fresh.event[name]) for name, values in stored.event.items()},
            user={name: self._profiles(values, rows) for name, values in stored.user.items()},
            now=_microseconds([request.now for request in requests]),
        )
        known = [int((item[histories.events_of(b)] >= FIRST).sum()) for b in range(len(requests))]
        unknown = [int((fresh.item[fresh.events_of(b)] < FIRST).sum()) for b in range(len(requests))]
        return histories, [_User(*user) for user in zip(rows, known, unknown, strict=True)]

    @staticmethod
    def _profiles(values: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        missing = np.nan if values.dtype.kind == "f" else 0
        there = np.array([row >= 0 for row in rows]).reshape(-1, *[1] * (values.ndim - 1))
        return np.where(there, values[[max(row, 0) for row in rows]], np.asarray(missing, values.dtype))

    def _encode_events(self, events: Sequence[Sequence[Event]]) -> Histories:
        flat = [event for history in events for event in history]
        time = _microseconds([event.timestamp for event in flat])
        encoded = {}
        for name, view in self.config.views_at("event").items():
            if not isinstance(view, (CategoryView, NumberView)):
                encoded[name] = time
            else:
                raw = [event.values.get(view.column) for event in flat]
                encoded[name] = self._data.fitted.encode(name, view, _raw_values(view, raw, "events"))
        return Histories(
            user_ids=pa.nulls(len(events), pa.string()),
            offsets=np.concatenate([[0], np.cumsum([len(history) for history in events])]).astype(np.int64),
            item=self._data.catalog.ids.index([event.item_id for event in flat]),
            time=time,
            split=np.zeros(len(flat), np.int8),
            event=encoded,
            user={},
            now=np.full(len(events), MISSING_TIME),
        )

    def _new_vectors(self, features: Sequence[Mapping[str, Any]], places: Sequence[int]) -> torch.Tensor:
        """Unit vectors of items that are not in the catalogue, from their raw columns."""
        columns: dict[str, pa.Array] = {}
        texts: list[str | None] = [None] * len(features)
        for name, view in self.config.views_at("item").items():
            if isinstance(view, TextView):
                texts = read_texts(features, view)
            elif isinstance(view, (CategoryView, NumberView)):
                columns[name] = _raw_values(view, [row.get(view.column) for row in features], "candidates")
            elif isinstance(view, VectorView):
                size = len(self._data.fitted.vectors[name][0])
                columns[name] = _raw_vectors(view, [row.get(view.column) for row in features], size, "candidates")
        table = pa.table(columns) if columns else pa.table({"none": pa.nulls(len(features))})
        with torch.no_grad():
            tensors = item_features(self.config, table, self._data.fitted, rows_before=0)
            return self._model.item_vectors(self._model.new_item_views(tensors, texts))[0]


def _microseconds(seconds: Sequence[float | None]) -> np.ndarray:
    """int64 [n], MISSING_TIME for None."""
    return np.array([MISSING_TIME if s is None else round(s * MICROSECONDS) for s in seconds], np.int64)


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
