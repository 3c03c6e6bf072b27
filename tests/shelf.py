"""A backend of three books for the tests of the routes and the page: answers known by heart, no model and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mvrec_core.errors import RequestError
from mvrec_core.explanations import Contribution, Explanation
from mvrec_core.recommender import Answer, Recommended, Scored
from mvrec_core.requests import Candidate, Item, Request

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

    def __init__(self) -> None:
        self.request: Request | None = None
        self.items: tuple[Item, ...] = ()
        self.delay_s = 0.0

    async def recommend(self, request: Request) -> Answer:
        self.request = request
        await asyncio.sleep(self.delay_s)
        if request.k > self.n_items:
            raise RequestError(f"k is at most {self.n_items}, found {request.k}", "k")
        if request.user_id == "broken":
            raise ZeroDivisionError
        why = WHY if request.explain else None
        items = [Recommended(item, 3.0 - place, place + 1, TITLES[item], why) for place, item in enumerate(TITLES)]
        unknown = sum(event.item_id not in TITLES for event in request.events)
        return Answer(
            "history" if request.user_id == "ann" else "popularity", items[: request.k], unknown, why and why.views
        )

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> tuple[str, list[Scored], int]:
        self.request = request
        known = [one.item_id is None or one.item_id in TITLES for one in candidates]
        pairs = zip(candidates, known, strict=True)
        scored = [Scored(one.item_id, 0.0 if found else None, 0.5 if found else None) for one, found in pairs]
        return "history", scored, known.count(False)

    async def similar(self, item_id: str, request: Request) -> list[Recommended]:
        if item_id not in TITLES:
            raise RequestError(f"item '{item_id}' is not in the catalogue", "item_id", status=404)
        others = [item for item in TITLES if item not in {item_id, *request.deny}][: request.k]
        return [Recommended(item, 0.9, place + 1, TITLES[item]) for place, item in enumerate(others)]

    async def put_items(self, items: Sequence[Item]) -> dict[str, Any]:
        self.items = tuple(items)
        return {"model_version": self.model_version, "items_version": 1, "items": 3 + len(items)}

    async def remove_items(self, item_ids: Sequence[str]) -> dict[str, Any]:
        for item_id in item_ids:
            if item_id not in TITLES:
                raise RequestError(f"item '{item_id}' is not in the catalogue", "item_id", status=404)
        return {"model_version": self.model_version, "items_version": 1, "items": 3 - len(item_ids)}

    async def history(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        if user_id != "ann":
            raise RequestError(f"user '{user_id}' is not known", "user_id", status=404)
        return [{"item_id": "b", "display": TITLES["b"], "timestamp": 881250949.0}][:limit]

    async def users(self, prefix: str, limit: int) -> list[str]:
        return [user for user in ("ann", "安") if user.startswith(prefix)][:limit]
