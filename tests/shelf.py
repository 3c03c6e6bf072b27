"""A backend of three books for the tests of the routes and the page: answers known by heart, no model and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mvrec_core.answers import Answer, Recommended, Scored
from mvrec_core.errors import Overloaded, RequestError, StateUnavailable
from mvrec_core.explanations import Contribution, Explanation
from mvrec_core.requests import Candidate, Item, Request
from serve.answers import (
    as_json,
    events_values,
    forgotten_values,
    history_values,
    recommend_values,
    score_values,
    similar_values,
)
from serve.metrics import Metrics
from serve.sessions import LiveEvent, joined, live_events, without
from serve.watch import Watch

TITLES = {"a": "霸王别姬", "b": "المومياء", "c": "<script>document.title='broken'</script>"}
WHY = Explanation(
    views={"id": 0.25, "text": 0.75},
    baseline=0.5,
    events=[
        Contribution(item, title, 8.0 + place, 0.5 - place * 0.125, {"id": 0.5, "text": -place * 0.125})
        for place, (item, title) in enumerate([*TITLES.items()] * 3)
    ],
    error=0.0,
    ranks={"id": 3, "text": 1},
)


class Shelf:
    """Recommends its books in order; remembers the last request that it saw."""

    model_version = "shelf-1"
    n_items = 3
    keys: Sequence[str] = ()

    def __init__(self) -> None:
        self.watch = Watch(Metrics("shelf"))
        self.request: Request | None = None
        self.items: tuple[Item, ...] = ()
        self.delay_s = 0.0
        self.rows: dict[str, str] = {}
        self.away = False  # the store of live events
        self.full: Overloaded | None = None

    def overload(self) -> Overloaded | None:
        return self.full

    async def recommend(self, request: Request) -> bytes:
        self.request = request
        await asyncio.sleep(self.delay_s)
        if request.k > self.n_items:
            raise RequestError(f"k is at most {self.n_items}, found {request.k}", "k")
        if request.user_id == "broken":
            raise ZeroDivisionError
        why = WHY if request.explain else None
        items = [Recommended(item, 3.0 - place, place + 1, TITLES[item], why) for place, item in enumerate(TITLES)]
        unknown = sum(event.item_id not in TITLES for event in request.events)
        rung = "history" if request.user_id == "ann" or request.user_id in self.rows else "popularity"
        answer = Answer(rung, items[: request.k], unknown, why and why.views)
        return as_json(recommend_values(self.model_version, answer, self.away))

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> bytes:
        self.request = request
        known = [one.item_id is None or one.item_id in TITLES for one in candidates]
        pairs = zip(candidates, known, strict=True)
        scored = [Scored(one.item_id, 0.0 if found else None, 0.5 if found else None) for one, found in pairs]
        return as_json(score_values(self.model_version, "history", scored, known.count(False), self.away))

    async def similar(self, item_id: str, request: Request) -> bytes:
        if item_id not in TITLES:
            raise RequestError(f"item '{item_id}' is not in the catalogue", "item_id", status=404)
        others = [item for item in TITLES if item not in {item_id, *request.deny}][: request.k]
        items = [Recommended(item, 0.9, place + 1, TITLES[item]) for place, item in enumerate(others)]
        return as_json(similar_values(self.model_version, item_id, items))

    def versions(self) -> list[dict[str, Any]]:
        live = {"model_version": self.model_version, "share": 1.0, "since": 1.8e9, "state": "live", "reason": None}
        return [live]

    async def put_items(self, items: Sequence[Item]) -> dict[str, Any]:
        self.items = tuple(items)
        return {"model_version": self.model_version, "items_version": 1, "items": 3 + len(items)}

    async def remove_items(self, item_ids: Sequence[str]) -> dict[str, Any]:
        for item_id in item_ids:
            if item_id not in TITLES:
                raise RequestError(f"item '{item_id}' is not in the catalogue", "item_id", status=404)
        return {"model_version": self.model_version, "items_version": 1, "items": 3 - len(item_ids)}

    async def history(self, user_id: str, limit: int) -> bytes:
        if user_id != "ann" and user_id not in self.rows:
            raise RequestError(f"user '{user_id}' is not known", "user_id", status=404)
        events = [("b", 881250949.0, False)] if user_id == "ann" else []
        events += [(event.item_id, event.timestamp, True) for event in live_events(self.rows.get(user_id, ""))]
        keys = ("item_id", "timestamp", "live")
        newest = [{"display": TITLES.get(one[0])} | dict(zip(keys, one, strict=True)) for one in events[::-1]]
        return as_json(history_values(user_id, newest[:limit], self.away))

    async def forget(self, user_id: str, event_ids: Sequence[str] | None) -> bytes:
        if self.away:
            raise StateUnavailable("the shelf is locked")
        row, forgotten = without(self.rows.pop(user_id, ""), event_ids)
        self.rows |= {user_id: row} if row else {}
        return as_json(forgotten_values(user_id, forgotten))

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> bytes:
        if self.away:
            raise StateUnavailable("the shelf is locked")
        self.rows[user_id], appended = joined(self.rows.get(user_id, ""), events, 200)
        return as_json(events_values(user_id, sum(one.item_id not in TITLES for one in events), appended))

    async def users(self, prefix: str, limit: int) -> list[str]:
        return [user for user in ("ann", "安") if user.startswith(prefix)][:limit]


def error(response: Any) -> tuple[int, str, str | None]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "field"}
    return response.status_code, body["error"]["code"], body["error"]["field"]
