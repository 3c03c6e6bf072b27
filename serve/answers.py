"""What the HTTP interface gives: answers as models for its description, and as plain values and JSON, which are made
without these models, as that is quicker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from mvrec_core.answers import Answer, Recommended, Scored
from mvrec_core.explanations import Explanation
from mvrec_core.recommender import Recommender
from serve.sessions import Appended, Forgotten

MAX_REASONS = 5  # events of an explanation


class JSON(Response):
    """Of plain values, or of JSON that has been made already."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else as_json(content)


class EventReason(BaseModel):
    """What an event of the history adds to the score of an item."""

    item_id: str
    display: str | None
    timestamp: float | None = Field(description="Unix seconds")
    score: float
    views: dict[str, float] = Field(description="through which view of the event; with `again` they add up to score")
    again: float = Field(description="what the event adds because it is of the same item; 0 where items do not repeat")


class ItemAnswer(BaseModel):
    """With explain, score = baseline + the scores of events + others."""

    item_id: str
    score: float = Field(description="cosine / temperature + bias; the higher the better")
    rank: int = Field(description="from 1; with diversity or caps not the order of the scores")
    display: str | None = Field(description="what to show people, such as the title")
    views: dict[str, float] | None = Field(None, description="weights that sum to 1; only with explain")
    events: list[EventReason] | None = Field(None, description="those that moved the score most, the strongest first")
    others: float | None = Field(None, description="what the other events add to the score")
    baseline: float | None = Field(None, description="the score, were every event of the catalogue's mean item")
    ranks: dict[str, int] | None = Field(None, description="the rank of the item if that view were not there")


class LiveAnswer(BaseModel):
    """An answer about a user whose live events count."""

    degraded: bool = Field(False, description="true: live events could not be read, and the answer is without them")


class RecommendAnswer(LiveAnswer):
    model_version: str
    rung: str = Field(description="what the answer rests on: history, profile, popularity")
    items: list[ItemAnswer]
    unknown_items: int = Field(description="how many ids of the request are not in the catalogue")
    views: dict[str, float] | None = Field(None, description="mean weights of the history's views; only with explain")


class CandidateAnswer(BaseModel):
    item_id: str | None
    score: float | None = Field(description="null where the id is unknown")
    probability: float | None = Field(description="sigmoid of the score")


class ScoreAnswer(LiveAnswer):
    model_version: str
    rung: str
    candidates: list[CandidateAnswer] = Field(description="in the order of the request")
    unknown_items: int


class SimilarAnswer(BaseModel):
    model_version: str
    item_id: str
    items: list[ItemAnswer]


class ItemsAnswer(BaseModel):
    model_version: str
    items_version: int = Field(description="grows with each change of the catalogue since the model was trained")
    items: int = Field(description="how many there are to recommend now")


class HistoryEvent(BaseModel):
    item_id: str
    display: str | None
    timestamp: float | None = Field(description="Unix seconds")
    live: bool = Field(description="it came by /v1/events, after the model was trained")


class HistoryAnswer(LiveAnswer):
    user_id: str
    events: list[HistoryEvent] = Field(description="newest first")


class EventsAnswer(BaseModel):
    user_id: str
    accepted: int = Field(description="events that are new")
    duplicates: int = Field(description="events that were there already")
    unknown_items: int = Field(description="events of items that the catalogue lacks; they are kept")
    live_events: int = Field(description="how many are kept of the user now")


class ForgottenAnswer(BaseModel):
    user_id: str
    forgotten: int = Field(description="live events that were there")
    live_events: int = Field(description="how many are kept of the user now")


class UsersAnswer(BaseModel):
    users: list[str]


class VersionAnswer(BaseModel):
    model_version: str
    share: float = Field(description="of the users")
    since: float = Field(description="Unix seconds: when it was given this share")
    state: Literal["live", "loading", "refused"]
    reason: str | None = Field(description="why it was refused")
    exclude_seen: bool | None = Field(description="of requests that do not say; null of what is not live")


class VersionsAnswer(BaseModel):
    versions: list[VersionAnswer] = Field(description="of the replica that answers; others may be a moment ahead")


class HealthAnswer(BaseModel):
    status: str
    model_version: str | None = None
    items: int | None = Field(None, description="how many there are to recommend: the largest k")


class ErrorDetail(BaseModel):
    code: str = Field(description="a stable word for programs, such as invalid_request, not_found, overloaded")
    message: str = Field(description="one sentence for people")
    field: str | None = Field(description="the part of the request at fault, such as events.0.timestamp")


class ErrorAnswer(BaseModel):
    error: ErrorDetail


def item_values(item: Recommended) -> dict[str, Any]:
    """An ItemAnswer as plain values; without reasons where they were not asked for."""
    values = {"item_id": item.item_id, "score": item.score, "rank": item.rank, "display": item.display}
    return values if item.explanation is None else values | reason_values(item.explanation)


def reason_values(why: Explanation) -> dict[str, Any]:
    """An Explanation as a few plain values: of the events the strongest, and the sum of the others."""
    order = sorted(why.events, key=lambda event: -abs(event.score))
    return {
        "views": why.views,
        "events": [asdict(event) for event in order[:MAX_REASONS]],
        "others": sum(event.score for event in order[MAX_REASONS:]) + why.error,
        "baseline": why.baseline,
        "ranks": why.ranks,
    }


def recommend_values(model_version: str, answer: Answer, degraded: bool = False) -> dict[str, Any]:
    """A RecommendAnswer as plain values."""
    views = {} if answer.views is None else {"views": answer.views}
    items = [item_values(item) for item in answer.items]
    return {**_head(model_version, answer.rung, answer.unknown_items, degraded), "items": items, **views}


def score_values(
    model_version: str, rung: str, scored: Sequence[Scored], unknown_items: int, degraded: bool = False
) -> dict[str, Any]:
    """A ScoreAnswer as plain values."""
    each = [{"item_id": one.item_id, "score": one.score, "probability": one.probability} for one in scored]
    return {**_head(model_version, rung, unknown_items, degraded), "candidates": each}


def _head(model_version: str, rung: str, unknown_items: int, degraded: bool) -> dict[str, Any]:
    """What an answer rests on; it comes first, where watch.py reads it without parsing the rest."""
    values = {"model_version": model_version, "rung": rung, "unknown_items": unknown_items}
    return values | degraded_values(degraded)


def similar_values(model_version: str, item_id: str, items: Sequence[Recommended]) -> dict[str, Any]:
    """A SimilarAnswer as plain values."""
    return {"model_version": model_version, "item_id": item_id, "items": [item_values(item) for item in items]}


def history_values(user_id: str, events: Sequence[Mapping[str, Any]], degraded: bool = False) -> dict[str, Any]:
    """A HistoryAnswer as plain values."""
    return {"user_id": user_id, "events": events, **degraded_values(degraded)}


def events_values(user_id: str, unknown_items: int, appended: Appended) -> dict[str, Any]:
    """An EventsAnswer as plain values."""
    return {
        "user_id": user_id,
        "accepted": appended.accepted,
        "duplicates": appended.duplicates,
        "unknown_items": unknown_items,
        "live_events": appended.live,
    }


def forgotten_values(user_id: str, forgotten: Forgotten) -> dict[str, Any]:
    """A ForgottenAnswer as plain values."""
    return {"user_id": user_id, "forgotten": forgotten.forgotten, "live_events": forgotten.live}


def degraded_values(degraded: bool) -> dict[str, Any]:
    """The key of a LiveAnswer, where it says something."""
    return {"degraded": True} if degraded else {}


def as_json(values: Any) -> bytes:
    """Compact UTF-8, not escaped; half a surrogate pair, which JSON can smuggle in, becomes a question mark."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def items_values(recommender: Recommender) -> dict[str, Any]:
    """An ItemsAnswer as plain values."""
    return {
        "model_version": recommender.model_version,
        "items_version": recommender.items_version,
        "items": recommender.n_items,
    }


def error_values(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    """An ErrorAnswer as plain values."""
    return {"error": {"code": code, "message": message, "field": field}}
