"""The one inference path: serving asks a Recommender, evaluation and batch lists ask what it makes of stored users."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
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
from mvrec_core.features import MISSING_TIME, item_features
from mvrec_core.index import NOTHING, best, top_k
from mvrec_core.live_items import Items, encode
from mvrec_core.policy import Filter, eligible
from mvrec_core.ranking import Users
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
from mvrec_core.sequences import TRAIN, Examples, Histories, live_examples
from mvrec_core.stored_users import StoredUsers

REMEMBERED_USERS = 10_000  # whose vectors are kept, so that another k or filter does not encode the history again
REMEMBERED_S = 600.0
MOST_WITHHELD = 20  # items that an answer names
LEAST_POOL = 200  # candidates of a list that is to be diverse or capped


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
        views = ranking.catalogue(self._model)[0]
        weights = ranking.item_vectors(self._model, views)[1]
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
        self._masks = items.masks()
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
        return self._all.recommended(*self._lists([request], Users.plain(vector), self._items, allowed)[0])

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
            {"item_id": item, "display": self._all.display(place), "timestamp": seconds, "live": is_live}
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

    # of all users and items

    @property
    def stored(self) -> StoredUsers:
        """What it makes of the users that its checkpoint holds."""
        return StoredUsers(self.config, self._model, self._histories, self._all)

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

    @property
    def histories(self) -> Histories:
        return self._histories

    # inside

    @property
    def _max_len(self) -> int:
        return self.config.model.max_len

    def _check_list(self, request: Request) -> None:
        self._all.check_k(request.k)
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
        lists = [self._all.recommended(*chosen) for chosen in self._ranked(requests, rungs, encoded, mask)]
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

    def _filter(self, seen: np.ndarray, exclude_seen: bool, request: Request) -> Filter:
        return Filter(
            seen[seen >= FIRST] if exclude_seen else (),
            None if request.allow is None else self._known(request.allow),
            self._known(request.deny),
            [*self._masks, *map(self._attributes.mask, request.where)],
        )

    def _known(self, ids: frozenset[str]) -> np.ndarray:
        index = self._data.catalog.ids.index(list(ids))
        return index[index >= FIRST]

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
