"""The one inference path: evaluation, batch lists and serving all ask a Recommender."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from cachetools import TTLCache

from mvrec_core import checkpoint, ranking
from mvrec_core.answers import Answer, Recommended, Scored, Withheld
from mvrec_core.attributes import Attributes
from mvrec_core.catalog import FIRST, UNKNOWN
from mvrec_core.config import Config
from mvrec_core.diversity import pick
from mvrec_core.errors import ConfigError, RequestError
from mvrec_core.explanations import Explainer, ViewUse, user_weights, view_use
from mvrec_core.features import MISSING_TIME
from mvrec_core.index import NOTHING, TopK, best, top_k
from mvrec_core.live_items import Items, encode
from mvrec_core.masking import hide_histories, hide_items
from mvrec_core.metrics import Ranks
from mvrec_core.model import item_features
from mvrec_core.policy import Filter, eligible
from mvrec_core.ranking import Users, rank_scores
from mvrec_core.requests import (
    MICROSECONDS,
    Candidate,
    Event,
    Item,
    Request,
    continued,
    digest,
    microseconds,
    read_events,
    read_features,
)
from mvrec_core.rules import Rules
from mvrec_core.sequences import TRAIN, Examples, Histories, live_examples, stage_examples

REMEMBERED_USERS = 10_000  # whose vectors are kept, so that another k or filter does not encode the history again
REMEMBERED_S = 600.0
MOST_WITHHELD = 20  # items that an answer names
LEAST_POOL = 200  # candidates of a list that is to be diverse or capped
ANY = Request()


@dataclass(frozen=True)
class _User:
    """A request's user as the model sees it: the whole history, and the row of the stored users or -1."""

    row: int
    known: int  # events of the history that are in the catalogue
    unknown: int  # events of the request that are not


def _pool(request: Request) -> int:
    """How many of the best items a request's list is chosen from."""
    return max(10 * request.k, LEAST_POOL) if request.diversity or request.caps else request.k


class Recommender:
    """Threads may share it: what it remembers is behind a lock, the rest is only read. Other items or rules make
    another Recommender, and a caller who swaps one reference sees one catalogue in each answer.

    items_version: what the caller of with_items called its items; 0 for those of the checkpoint
    version: 16 bytes that change with the model, the items and the rules; with the same ones answers are the same
    """

    def __init__(self, loaded: checkpoint.Checkpoint):
        self.config: Config = loaded.config
        self.model_version = loaded.model_version
        self.reference = loaded.reference  # None in checkpoints of earlier versions
        self.items_version = 0
        self._rules = Rules()
        self._model = loaded.model
        self._histories = loaded.data.histories(loaded.config)
        self._rows = {user_id: row for row, user_id in enumerate(self._histories.user_ids.to_pylist())}
        self._device = loaded.item_vectors.device
        self._tokens = Lock()  # a tokenizer serves one thread at a time
        views, _ = ranking.catalogue(self._model)
        with torch.no_grad():
            weights = self._model.item_vectors(views)[1]
        train = self._histories.item[self._histories.split == TRAIN]
        counts = np.bincount(train, minlength=len(loaded.item_vectors)).astype(np.float32)
        share = torch.from_numpy(counts / max(1.0, counts.sum())).to(self._device)
        nothing = torch.zeros(len(share), dtype=torch.bool, device=self._device)
        self._take(loaded.data, Items(loaded.data.catalog, views, loaded.item_vectors, weights, share, nothing))

    def _take(self, data: checkpoint.Data, items: Items) -> None:
        """Lays out what requests read. Of a Recommender that nobody else knows yet."""
        self._data = replace(data, catalog=items.catalog)
        self._all = items
        self._items, self._views, self._popularity = items.vectors, items.views, items.share
        self._explainer = Explainer(self._model, items.catalog, items.views, items.weights, items.vectors)
        self._attributes = Attributes.of(self.config, items.catalog.table)
        self._masks = [~items.gone] if bool(items.gone.any()) else []
        self.n_items = len(items)  # that may come, unless a rule withholds them
        self._why = self._reasons(self._rules)
        self._blocked = torch.from_numpy(np.array(sorted(self._why), np.int64)).to(self._device)
        self.version = digest(self.model_version, self.items_version, self._rules)
        self._encodings: TTLCache[bytes, Users] = TTLCache(REMEMBERED_USERS, REMEMBERED_S)  # of these items
        self._lock = Lock()

    @staticmethod
    def load(directory: str | Path, device: str = "cpu") -> Recommender:
        """Raises CheckpointError for a directory that is not a whole, unchanged checkpoint."""
        return Recommender(checkpoint.load(directory, device))

    def with_items(self, items: Sequence[Item], version: int) -> Recommender:
        """This one with items added, changed or removed; of an id the last entry counts. Raises RequestError naming
        the column of a wrong value."""
        latest = {item.item_id: item for item in items}
        kept = [item for item in latest.values() if item.features is not None]
        now = self._all.without([item.item_id for item in latest.values() if item.features is None])
        if kept:
            with self._tokens:
                now = now.with_items(self._model, self._data, kept)
        other = copy.copy(self)
        other.items_version = version
        other._take(self._data, now)
        return other

    def check_items(self, items: Sequence[Item]) -> None:
        """Raises RequestError naming the column of a value that with_items would refuse; far quicker than that."""
        read_features(self.config, self._data.fitted, [item.features or {} for item in items], "items")

    def knows(self, item_ids: Sequence[str]) -> list[bool]:
        """Which items may come, as far as rules let them."""
        rows = self._data.catalog.ids.index(item_ids)
        return ((rows >= FIRST) & ~self._all.gone[rows].cpu().numpy()).tolist()

    def with_rules(self, rules: Rules) -> Recommender:
        """This one with other rules. Raises ConfigError for a view that items do not have."""
        other = copy.copy(self)
        other._rules = rules
        other._take(self._data, self._all)
        return other

    def _reasons(self, rules: Rules) -> dict[int, str]:
        """{row: why} of the items that must not come."""
        why: dict[int, str] = {}
        for place, rule in enumerate(rules.block):
            try:
                self._attributes.check(rule.conditions)
            except RequestError as error:
                raise ConfigError(f"block.{place}.{str(error).removeprefix('filter.')}") from None
            rows = self._known(frozenset(rule.items)).tolist()
            for condition in rule.conditions:
                rows += self._attributes.mask(condition)[FIRST:].nonzero()[:, 0].add(FIRST).tolist()
            for row in rows:
                why.setdefault(row, rule.why)
        return why

    # requests

    def recommend(self, requests: Sequence[Request]) -> list[Answer | RequestError]:
        """An answer for each request; a bad one holds its own error and leaves the others alone."""
        requests = [self._with_live(request) for request in requests]
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
        request = self._with_live(request)
        histories, users = self._users([request])
        rung = self._rung(users[0])
        index = self._data.catalog.ids.index([candidate.item_id or "" for candidate in candidates])
        new = [place for place, candidate in enumerate(candidates) if candidate.features is not None]
        vectors = self._items[index]
        if new:
            vectors = vectors.clone()
            vectors[new] = self._new_vectors([dict(candidates[place].features or {}) for place in new])
        known = (index >= FIRST) & ~self._all.gone[index].cpu().numpy()
        strangers = sum(1 for place, there in enumerate(known) if not there and candidates[place].features is None)
        known[new] = True
        if rung == "popularity":
            known &= index >= FIRST  # of what is not in the catalogue nobody knows how popular it is
            scores = self._popularity[index]
            chances = scores
        else:
            users_1 = self._encode([request], histories, live_examples(histories, self._max_len))
            with torch.no_grad():
                scores = vectors @ users_1.vector[0] / self._model.tau + self._model.bias
                scores += users_1.lifts(torch.from_numpy(index).to(self._device))[0]
            chances = scores.sigmoid()
        scored = [
            Scored(c.item_id, float(s) if k else None, float(p) if k else None)
            for c, k, s, p in zip(candidates, known, scores, chances, strict=True)
        ]
        return rung, scored, users[0].unknown + strangers

    def similar(self, item_id: str, request: Request) -> list[Recommended]:
        """The k items whose vectors are nearest by cosine, the item itself left out, with the filters, the diversity
        and the caps of a request. Raises RequestError."""
        self._check_list(request)
        index = int(self._data.catalog.ids.index([item_id])[0])
        if index == UNKNOWN or self._all.gone[index]:
            raise RequestError(f"item_id: '{item_id}' is not in the catalogue", "item_id", 404)
        wanted = eligible([self._filter(np.array([index]), True, request)], len(self._items), self._device)
        allowed = wanted.index_fill(1, self._blocked, False)
        vector = F.normalize(self._items[[index]], dim=-1)  # that of a new item is shorter
        return self._list(*self._lists([request], Users.plain(vector), self._items, allowed)[0])

    def excludes_seen(self, request: Request) -> bool:
        return self.config.evaluate.exclude_seen if request.exclude_seen is None else request.exclude_seen

    def moment(self, request: Request, clock: float) -> float | None:
        """The request's `now` in Unix seconds. Of "clock" it is the last moment until then that is a power of two of
        seconds after the user's last event: the model tells gaps apart by these, so answers can be remembered. None for
        a model without a time view, or where no time of a last event is known."""
        if request.now != "clock":
            return request.now
        last = self._last_time(request)
        if last is None or self._model.until is None:
            return None
        gap = int(clock - last)
        return last + (1 << gap.bit_length() - 1 if gap > 0 else 0)

    def _last_time(self, request: Request) -> float | None:
        """Of the user's last event, in Unix seconds."""
        if request.events or request.live:
            return (request.events or request.live)[-1].timestamp
        row = self._rows.get(request.user_id, -1) if request.user_id is not None else -1
        stored = self._histories.events_of(row) if row >= 0 else slice(0, 0)
        if stored.start == stored.stop or self._histories.time[stored.stop - 1] == MISSING_TIME:
            return None
        return float(self._histories.time[stored.stop - 1]) / MICROSECONDS

    def history(self, user_id: str, limit: int, live: Sequence[Event] = ()) -> list[dict[str, Any]]:
        """The newest `limit` events of a user, newest first: item_id, display, timestamp in Unix seconds, and whether
        it is one of the live ones, which follow the stored. Raises RequestError for a user with neither."""
        if user_id not in self._rows and not live:
            raise RequestError(f"user_id: '{user_id}' is not known", "user_id", 404)
        later = [(e.item_id, e.timestamp, True) for e in self._with_live(Request(user_id, live=tuple(live))).live]
        stored = [(item, None if t is None else t / MICROSECONDS, False) for item, t in self._stored(user_id)]
        newest = [*stored, *later][::-1][:limit]
        index = self._data.catalog.ids.index([item for item, _, _ in newest])
        return [
            {"item_id": item, "display": self._display(place), "timestamp": seconds, "live": is_live}
            for (item, seconds, is_live), place in zip(newest, index.tolist(), strict=True)
        ]

    def unknown_items(self, events: Sequence[Event]) -> int:
        """How many of the events are of no item of the catalogue. Raises RequestError for one that cannot be read."""
        return int((read_events(self.config, self._data, [events]).item < FIRST).sum())

    def view_use(self, request: Request) -> ViewUse:
        """What the model makes of the views in a request's history, user-level views included among the missing.
        Raises RequestError."""
        histories, _ = self._users([self._with_live(request)])
        use = view_use(self._model, histories, live_examples(histories, self._max_len), self._views)[0]
        profile = {name: float(not self._present(values[0]).any()) for name, values in histories.user.items()}
        return replace(use, missing=use.missing | profile)

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

    @torch.no_grad()
    def rank_stage(
        self, stage: str, hidden: Collection[str] = (), timed: bool = True, most: int | None = None
    ) -> tuple[Examples, Ranks]:
        """The users that have a target in "valid" or "test", and where it stands among the whole catalogue when the
        hidden views are not there; with `timed` False, when the model is not told at what time the target happened.

        most: users; of more than that so many, evenly from all
        """
        examples = self._stage(stage, most)
        exclude_seen = self.config.evaluate.exclude_seen
        ranked = [
            rank_scores(users.scores(self._model, items), self._histories, part, exclude_seen)
            for part, users, items in self._encoded(examples, hidden, timed)
        ]
        return examples, Ranks.concatenate(ranked)

    def best_rows(
        self, stage: str, k: int, hidden: Collection[str] = (), most: int | None = None
    ) -> tuple[Examples, torch.Tensor]:
        """The same users and their k best catalogue rows, int64 [B, k], NOTHING where fewer may come."""
        examples = self._stage(stage, most)
        best = [
            self._top_k(users, items, k, eligible(self._seen_before(part), len(items), self._device)).index
            for part, users, items in self._encoded(examples, hidden)
        ]
        return examples, torch.cat([torch.empty(0, k, dtype=torch.int64, device=self._device), *best])

    def view_weights(self, stage: str) -> tuple[Examples, list[dict[str, float]]]:
        """The same users and the mean view weights of their steps, {} where there are none."""
        examples = stage_examples(self._histories, stage, self._max_len)
        size = self.config.evaluate.batch_size
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        return examples, [w for p in parts for w in user_weights(self._model, self._histories, p, self._views)]

    @torch.no_grad()
    def score_stage(self, stage: str, batch_size: int) -> Iterator[tuple[Examples, torch.Tensor]]:
        """The same users a batch at a time, and their scores of all rows of the catalogue, float32 [B, N]."""
        examples = stage_examples(self._histories, stage, self._max_len)
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            users = ranking.encode(self._model, self._histories, part, self._views, self._items)
            yield part, users.scores(self._model, self._items)

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

    def lists(self, stage: str, k: int, users: slice = slice(None), now: int | None = None) -> pa.Table:
        """user_id, rank (from 1), item_id, score for stored users: "test" from what came before the test event, the
        lists that the metrics are computed from; "live" from all history. Raises RequestError for a bad k.

        now: of "live", when they will be read, in microseconds; None: it is not known
        users: which of them; where it begins at a multiple of evaluate.batch_size the lists are the same to the bit
        """
        self._check_k(k)
        histories = self._histories
        if stage == "live" and now is not None:
            histories = replace(histories, now=np.full_like(histories.now, now))
        examples = (
            live_examples(histories, self._max_len)
            if stage == "live"
            else stage_examples(histories, stage, self._max_len)
        )
        columns: dict[str, list[Any]] = {"user_id": [], "rank": [], "item_id": [], "score": []}
        for part, encoded, _ in self._encoded(examples[users], histories=histories):
            for user, (index, score) in zip(
                part.user.tolist(), self._best(encoded, self._seen_before(part), k), strict=True
            ):
                user_id = self._histories.user_ids[user].as_py()
                for recommended in self._list(index, score):
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

    @torch.no_grad()
    def _encoded(
        self,
        examples: Examples,
        hidden: Collection[str] = (),
        timed: bool = True,
        histories: Histories | None = None,
    ) -> Iterator[tuple[Examples, Users, torch.Tensor]]:
        """Some examples at a time, of the stored histories or others, their users and the catalogue's vectors [N, D],
        without the hidden views."""
        views, items, histories = self._views, self._items, histories or self._histories
        if hidden:
            views = hide_items(views, self.config, hidden)
            items, histories = self._model.item_vectors(views)[0], hide_histories(histories, self.config, hidden)
        for start in range(0, len(examples), self.config.evaluate.batch_size):
            part = examples[start : start + self.config.evaluate.batch_size]
            yield part, ranking.encode(self._model, histories, part, views, items, timed), items

    def _stage(self, stage: str, most: int | None) -> Examples:
        examples = stage_examples(self._histories, stage, self._max_len)
        if most is None or len(examples) <= most:
            return examples
        return examples[np.linspace(0, len(examples) - 1, most).astype(np.int64)]

    def _seen_before(self, examples: Examples) -> list[Filter]:
        """What each example's list leaves out: by configuration, the items of its history."""
        return [
            self._filter(self._histories.item[self._histories.events_of(u, s)], self.config.evaluate.exclude_seen)
            for u, s in zip(examples.user, examples.stop, strict=True)
        ]

    @property
    def _max_len(self) -> int:
        return self.config.model.max_len

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.n_items:
            raise RequestError(f"k: expected 1 to {self.n_items}, the size of the catalogue, found {k}", "k")

    def _check_list(self, request: Request) -> None:
        self._check_k(request.k)
        self._attributes.check(request.where, request.caps)

    def _refuse(self, request: Request) -> RequestError | None:
        try:
            self._check_list(request)
            if request.events:
                read_events(self.config, self._data, [request.events])
        except RequestError as error:
            return error
        return None

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        histories, users = self._users(requests)
        examples = live_examples(histories, self._max_len)
        encoded = self._encode(requests, histories, examples)
        filters = []
        for place, request in enumerate(requests):
            seen = histories.item[histories.events_of(place)]
            filters.append(self._filter(seen, self.excludes_seen(request), request))
        wanted = eligible(filters, len(self._items), self._device)
        mask = wanted.index_fill(1, self._blocked, False) if len(self._blocked) else wanted
        rungs = [self._rung(user) for user in users]
        lists = [self._list(*chosen) for chosen in self._ranked(requests, rungs, encoded, mask)]
        answers = [Answer(rung, items, user.unknown) for rung, items, user in zip(rungs, lists, users, strict=True)]
        if len(self._blocked):
            held = self._withheld(answers, requests, encoded, wanted)
            answers = [replace(answer, withheld=items) for answer, items in zip(answers, held, strict=True)]
        asked = [place for place, request in enumerate(requests) if request.explain]
        if asked:
            part = examples[np.array(asked)]
            explained = self._explained([answers[place] for place in asked], histories, part, mask[asked])
            for place, answer in zip(asked, explained, strict=True):
                answers[place] = answer
        return answers

    def _encode(self, requests: Sequence[Request], histories: Histories, examples: Examples) -> Users:
        """The users of requests. A history is encoded once in a while, whatever else is asked."""
        keys = [digest(r.user_id, r.live, r.events, r.now) for r in requests]
        with self._lock:
            there = {key: one for key in keys if (one := self._encodings.get(key)) is not None}
        places = {key: place for place, key in enumerate(keys) if key not in there}
        if places:
            part = examples[np.array(list(places.values()))]
            new = ranking.encode(self._model, histories, part, self._views, self._items)
            there |= {key: new[place : place + 1].copy() for place, key in enumerate(places)}
            with self._lock:
                self._encodings.update((key, there[key]) for key in places)
        return Users.together([there[key] for key in keys])

    def _with_live(self, request: Request) -> Request:
        """The request at a moment, with those live events alone that the stored history does not hold already, because
        the model has been trained since, and that this model can read: another one took them in."""
        if request.now == "clock":
            request = replace(request, now=self.moment(request, time.time()))
        if not request.live:
            return request
        stored = set(self._stored(request.user_id))
        times = microseconds([event.timestamp for event in request.live]).tolist()
        live = [e for e, at in zip(request.live, times, strict=True) if (e.item_id, at) not in stored]
        if not self._readable(live):
            live = [event for event in live if self._readable([event])]
        return replace(request, live=tuple(live))

    def _stored(self, user_id: str | None) -> list[tuple[str, int | None]]:
        """A user's stored events in order: item_id, and time in microseconds."""
        row = self._rows.get(user_id, -1) if user_id is not None else -1
        if row < 0:
            return []
        user = self._data.users.slice(row, 1)
        return list(zip(user["item"][0].as_py(), user["timestamp"][0].as_py(), strict=True))

    def _readable(self, events: Sequence[Event]) -> bool:
        try:
            read_events(self.config, self._data, [events])
        except RequestError:
            return False
        return True

    @torch.no_grad()
    def _ranked(
        self, requests: Sequence[Request], rungs: Sequence[str], users: Users, mask_BN: torch.Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Rows and scores of each request's list, by the model or by what is popular."""
        model = [place for place, rung in enumerate(rungs) if rung != "popularity"]
        popular = [place for place, rung in enumerate(rungs) if rung == "popularity"]
        scale, bias = 1 / self._model.tau, self._model.bias
        found = self._lists([requests[b] for b in model], users[model], self._items, mask_BN[model], scale, bias)
        ones, share = Users.plain(self._popularity.new_ones(len(popular), 1)), self._popularity[:, None]
        found += self._lists([requests[b] for b in popular], ones, share, mask_BN[popular])
        lists = dict(zip(model + popular, found, strict=True))
        return [lists[b] for b in range(len(requests))]

    def _lists(
        self,
        requests: Sequence[Request],
        users: Users,
        items_ND: torch.Tensor,
        mask_BN: torch.Tensor,
        scale: float | torch.Tensor = 1.0,
        bias: float | torch.Tensor = 0.0,
    ) -> list[tuple[list[int], list[float]]]:
        """A pool of the best for each request, and from it the list. One too small for the caps grows until the list is
        full or nothing is left."""
        lists: list[tuple[list[int], list[float]]] = [([], [])] * len(requests)
        waiting, grown = list(range(len(requests))), 1
        while waiting:
            pools = [_pool(requests[b]) * grown for b in waiting]
            most = min(max(pools), len(items_ND))
            some = users[waiting]
            found = top_k(some.vector, items_ND, most, mask_BN[waiting], scale, bias, some.row, some.lift)
            short = []
            for place, (b, pool) in enumerate(zip(waiting, pools, strict=True)):
                rows, scores = found.index[place, :pool], found.score[place, :pool]
                there = rows != NOTHING
                lists[b] = self._chosen(requests[b], rows[there], scores[there])
                if len(lists[b][0]) < requests[b].k and pool == int(there.sum()):
                    short.append(b)
            waiting, grown = short, 4 * grown
        return lists

    @torch.no_grad()
    def _withheld(
        self, answers: Sequence[Answer], requests: Sequence[Request], users: Users, wanted_BN: torch.Tensor
    ) -> list[tuple[Withheld, ...]]:
        """For each answer what rules kept from it, best first."""
        rows, most = self._blocked, min(MOST_WITHHELD, len(self._blocked))
        scores_BW = users.vector @ self._items[rows].T / self._model.tau + self._model.bias + users.lifts(rows)
        popular_B1 = torch.tensor([[answer.rung == "popularity"] for answer in answers], device=rows.device)
        scores_BW = torch.where(popular_B1, self._popularity[rows], scores_BW)
        found = best(scores_BW.masked_fill(~wanted_BN[:, rows], -torch.inf), most)
        out = []
        for answer, request, places, scores in zip(answers, requests, found.index, found.score, strict=True):
            full = len(answer.items) == request.k
            lowest = min(item.score for item in answer.items) if full else -torch.inf
            kept = rows[places[(scores > lowest) & (places != NOTHING)]].tolist()
            out.append(tuple(Withheld(self._data.catalog.ids.value(row), self._why[row]) for row in kept))
        return out

    def _chosen(self, request: Request, rows: torch.Tensor, scores: torch.Tensor) -> tuple[list[int], list[float]]:
        """Of the best rows, best first, those of the list that a request wants."""
        if request.diversity or request.caps:
            index = rows.cpu().numpy()
            caps = [(self._attributes.categories[view].of_rows(index), most) for view, most in request.caps]
            vectors_CD = self._items[rows].cpu().numpy()
            chosen = pick(scores.double().cpu().numpy(), vectors_CD, request.k, request.diversity, caps)
            rows, scores = rows[chosen], scores[chosen]
        return rows[: request.k].tolist(), scores[: request.k].tolist()

    def _explained(
        self, answers: Sequence[Answer], histories: Histories, examples: Examples, eligible_BN: torch.Tensor
    ) -> list[Answer]:
        """The answers to the examples' users with an explanation of each item; popularity rests on no event or view."""
        index = [self._data.catalog.ids.index([item.item_id for item in answer.items]) for answer in answers]
        found = self._explainer.explain(histories, examples, index, eligible_BN)
        weights = user_weights(self._model, histories, examples, self._views)
        out = []
        for answer, views, explanations in zip(answers, weights, found, strict=True):
            if answer.rung == "popularity":
                views = {}
                explanations = [
                    replace(why, baseline=item.score, events=[], error=0.0, ranks={})
                    for item, why in zip(answer.items, explanations, strict=True)
                ]
            items = [replace(i, explanation=why) for i, why in zip(answer.items, explanations, strict=True)]
            out.append(replace(answer, items=items, views=views))
        return out

    def _rung(self, user: _User) -> str:
        if user.known:
            return "history"
        has_profile = any((self._present(values[user.row])).any() for values in self._histories.user.values())
        return "profile" if user.row >= 0 and has_profile else "popularity"

    @staticmethod
    def _present(values: np.ndarray) -> np.ndarray:
        return ~np.isnan(values) if values.dtype.kind == "f" else values != 0

    def _filter(self, seen: np.ndarray, exclude_seen: bool, request: Request = ANY) -> Filter:
        return Filter(
            seen[seen >= FIRST] if exclude_seen else (),
            None if request.allow is None else self._known(request.allow),
            self._known(request.deny),
            [*self._masks, *map(self._attributes.mask, request.where)],
        )

    def _known(self, ids: frozenset[str]) -> np.ndarray:
        index = self._data.catalog.ids.index(list(ids))
        return index[index >= FIRST]

    @torch.no_grad()
    def _best(self, users: Users, filters: Sequence[Filter], k: int) -> list[tuple[list[int], list[float]]]:
        found = self._top_k(users, self._items, k, eligible(filters, len(self._items), self._device))
        return list(zip(found.index.tolist(), found.score.tolist(), strict=True))

    def _top_k(self, users: Users, items_ND: torch.Tensor, k: int, mask_BN: torch.Tensor) -> TopK:
        scale, bias = 1 / self._model.tau, self._model.bias
        return top_k(users.vector, items_ND, k, mask_BN, scale, bias, users.row, users.lift)

    def _list(self, index: Sequence[int], score: Sequence[float]) -> list[Recommended]:
        ids, out = self._data.catalog.ids, []
        for place, (row, value) in enumerate(zip(index, score, strict=True)):
            if row == NOTHING:
                break
            out.append(Recommended(ids.value(row), value, place + 1, self._display(row)))
        return out

    def _display(self, row: int) -> str | None:
        return self._data.catalog.display[row - FIRST] if row >= FIRST else None

    def _users(self, requests: Sequence[Request]) -> tuple[Histories, list[_User]]:
        """The requests' users as histories of their own: the stored events, then the request's."""
        fresh = read_events(self.config, self._data, [request.live + request.events for request in requests])
        rows = [self._rows.get(request.user_id, -1) if request.user_id is not None else -1 for request in requests]
        moments = [self.moment(request, time.time()) for request in requests]
        histories = replace(continued(self._histories, rows, fresh), now=microseconds(moments))
        known = [int((histories.item[histories.events_of(b)] >= FIRST).sum()) for b in range(len(requests))]
        unknown = [int((fresh.item[fresh.events_of(b)][len(r.live) :] < FIRST).sum()) for b, r in enumerate(requests)]
        return histories, [_User(*user) for user in zip(rows, known, unknown, strict=True)]

    def _new_vectors(self, features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Unit vectors of items that are not in the catalogue, from their raw columns."""
        with self._tokens, torch.no_grad():
            return self._model.item_vectors(encode(self._model, self._data, features)[1])[0]
