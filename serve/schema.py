"""What the HTTP interface takes and gives: bodies in, answers out, and one shape for every error.

A body is checked here, on the border, before it meets a batch. Ids may be JSON strings or integers and are strings from
here on; a timestamp is Unix seconds or an ISO-8601 string (UTC where no zone is named), and Unix seconds from here on.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mvrec_core.attributes import Between, Condition, OneOf
from mvrec_core.errors import RequestError, nearest
from mvrec_core.explanations import Explanation
from mvrec_core.recommender import Answer, Recommended, Recommender, Scored
from mvrec_core.requests import MICROSECONDS, Candidate, Event, Item, Request
from serve.sessions import Appended, Forgotten, LiveEvent

MAX_CANDIDATES = 1000
MAX_ITEMS = 200  # that one call may change: their texts are encoded before it is answered
MAX_LIVE_EVENTS = 1000  # that one call may append
LONGEST_ID, LONGEST_EVENT = 256, 2000  # characters of what is kept, as JSON
MAX_EXPLAINED = 100  # items of an answer: each costs as much as many answers
MAX_REASONS = 5  # events of an explanation
EXPECTED = {  # by the beginning of pydantic's name of an error
    "int": "an integer",
    "bool": "true or false",
    "float": "a number",
    "string": "a string",
    "tuple": "a list",
    "list": "a list",
    "dict": "a JSON object",
    "model": "a JSON object",
}
NULL: dict[str, Any] = {"type": "null"}
NOT_NULL: dict[str, Any] = {"not": NULL}
FIRST_SECOND, LAST_SECOND = -62_135_596_800.0, 253_402_300_799.0  # the years 1 to 9999, as datetime has them


def _id(value: object) -> object:
    """An id as text: 196 and "196" are the same user."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # to JSON 196.0 is an integer, and to prepare the id 196
        return str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"expected a string or an integer, found {_json_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which no file or answer can hold
        raise ValueError("expected Unicode text, found half of a surrogate pair") from None
    return value


def _seconds(value: object) -> float:
    """Unix seconds of a number or of an ISO-8601 text."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise ValueError(f"expected Unix seconds or an ISO-8601 date and time, found '{value}'") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value) if abs(value) < 1e18 else math.inf
    else:
        raise ValueError(f"expected Unix seconds or an ISO-8601 date and time, found {_json_kind(value)}")
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        raise ValueError(f"expected Unix seconds in the years 1 to 9999, found {value} (milliseconds?)")
    return seconds


def _json_kind(value: object) -> str:
    kinds = {
        bool: "a boolean",
        float: "a fraction",
        int: "an integer",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


Id = Annotated[
    str, BeforeValidator(_id), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}], "examples": ["196"]})
]
MOMENTS: list[dict[str, Any]] = [
    {"type": "number", "minimum": FIRST_SECOND, "maximum": LAST_SECOND},
    {"type": "string", "format": "date-time"},
]
Seconds = Annotated[float, BeforeValidator(_seconds), WithJsonSchema({"anyOf": MOMENTS, "examples": [881250949]})]
Now = Annotated[
    float | Literal["clock"],
    BeforeValidator(lambda value: value if value == "clock" else _seconds(value)),
    WithJsonSchema({"anyOf": [*MOMENTS, {"const": "clock"}], "examples": [881250949]}),
]


def _plain(features: dict[str, Any]) -> dict[str, Any]:
    _id(json.dumps(features, ensure_ascii=False))  # half a surrogate pair may be anywhere
    return features


Features = Annotated[dict[str, Any], AfterValidator(_plain)]
Most = Annotated[int, Field(ge=1, strict=True)]
ModelVersion = Annotated[str, Field(max_length=64, description="the version that is to answer, one of /v1/versions")]


class Strict(BaseModel):
    """A JSON object whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EventBody(BaseModel):
    """One event; keys beside these two are values of event-level views, such as "rating"."""

    model_config = ConfigDict(extra="allow", frozen=True)

    item_id: Id
    timestamp: Seconds | None = Field(None, description="Unix seconds, or an ISO-8601 date and time (UTC if no zone)")

    def event(self) -> Event:
        return Event(self.item_id, self.timestamp, dict(self.model_extra or {}))


class OneOfBody(Strict):
    """Of a category view of items. A value that no item has matches nothing."""

    any: tuple[Id, ...] | None = Field(None, description="items that have one of these")
    none: tuple[Id, ...] = Field((), description="items that have none of these")


class BetweenBody(Strict):
    """Of a number view of items, in the units of the data; an item that lacks the number does not pass."""

    min: float | None = Field(None, strict=True, allow_inf_nan=False)
    max: float | None = Field(None, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> BetweenBody:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"expected min at most max, found {self.min:g} and {self.max:g}")
        return self


class FilterBody(Strict):
    """What may be recommended; applied before the best k are taken, so k items come back where k are left."""

    allow: tuple[Id, ...] | None = Field(None, description="recommend nothing but these")
    deny: tuple[Id, ...] = Field((), description="never recommend these")
    categories: dict[str, OneOfBody] = Field({}, description='by category view: {"genres": {"any": ["Drama"]}}')
    ranges: dict[str, BetweenBody] = Field({}, description='by number view: {"year": {"min": 1990}}')

    def wishes(self) -> dict[str, Any]:
        allow = None if self.allow is None else frozenset(self.allow)
        return {"allow": allow, "deny": frozenset(self.deny), "where": self._where()}

    def _where(self) -> tuple[Condition, ...]:
        values = [
            OneOf(view, None if one.any is None else frozenset(one.any), frozenset(one.none))
            for view, one in self.categories.items()
        ]
        return (*values, *(Between(view, one.min, one.max) for view, one in self.ranges.items()))


class UserBody(Strict):
    """Who asks: a known user, events, or both; with both the events continue the stored history."""

    user_id: Id | None = None
    events: tuple[EventBody, ...] = Field((), description="in the order in which they happened")
    now: Now | None = Field(
        "clock",
        description='when it is asked, for a model with a time view: a time, or "clock" for the service\'s own, '
        "or null for a time that is not known",
    )
    model_version: ModelVersion | None = None

    def _events(self) -> tuple[Event, ...]:
        return tuple(event.event() for event in self.events)


class ListBody(Strict):
    """What a list may hold."""

    k: int = Field(10, ge=1, strict=True, description="how many items, at most the size of the catalogue")
    filter: FilterBody | None = None
    diversity: float = Field(
        0.0, ge=0, le=1, strict=True, description="how much it counts against an item to be like those above it"
    )
    caps: dict[str, Most] = Field(
        {}, description='at most so many items of one value of a category view: {"genres": 3}'
    )

    def _wishes(self) -> dict[str, Any]:
        filters = {} if self.filter is None else self.filter.wishes()
        return {"k": self.k, "diversity": self.diversity, "caps": tuple(self.caps.items()), **filters}


class RecommendBody(UserBody, ListBody):
    exclude_seen: bool | None = Field(
        None, strict=True, description="leave out the items of the history; null: as the model was evaluated"
    )
    explain: bool = Field(
        False,
        strict=True,
        description=f"say why: the weights of the views, the events, the ranks; k is at most {MAX_EXPLAINED} then",
    )

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": "196", "k": 10}]})

    def request(self) -> Request:
        """Raises RequestError for more explanations than one answer may hold."""
        if self.explain and self.k > MAX_EXPLAINED:
            raise RequestError(f"k: expected at most {MAX_EXPLAINED} with explain, found {self.k}", "k")
        return Request(
            user_id=self.user_id,
            events=self._events(),
            exclude_seen=self.exclude_seen,
            explain=self.explain,
            now=self.now,
            model_version=self.model_version,
            **self._wishes(),
        )


class SimilarBody(ListBody):
    item_id: Id
    model_version: ModelVersion | None = None

    def request(self) -> Request:
        return Request(model_version=self.model_version, **self._wishes())


class CandidateBody(Strict):
    """An item of the catalogue, or one that is not in it, described by its columns."""

    item_id: Id | None = None
    features: Features | None = Field(
        None, description='columns of the items file: {"title": ..., "image": [0.1, ...]}'
    )

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["item_id"], "properties": {"item_id": NOT_NULL, "features": NULL}},
                {"required": ["features"], "properties": {"features": NOT_NULL, "item_id": NULL}},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> CandidateBody:
        if (self.item_id is None) == (self.features is None):
            raise ValueError("expected either 'item_id' or 'features'")
        return self


class ScoreBody(UserBody):
    candidates: tuple[CandidateBody, ...] = Field(min_length=1, max_length=MAX_CANDIDATES)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "candidates": [{"item_id": "50"}, {"features": {"title": "Alien", "year": 1979}}]}
            ]
        }
    )

    def request(self) -> tuple[Request, tuple[Candidate, ...]]:
        candidates = tuple(Candidate(one.item_id, one.features) for one in self.candidates)
        request = Request(user_id=self.user_id, events=self._events(), now=self.now, model_version=self.model_version)
        return request, candidates


class LiveEventBody(EventBody):
    event_id: Id | None = Field(None, description="your name of the event; a user's second event of a name is dropped")

    @model_validator(mode="after")
    def _is_short(self) -> LiveEventBody:
        size = len(json.dumps([self.item_id, self.event_id, self.model_extra], default=str))
        if size > LONGEST_EVENT:
            raise ValueError(f"expected an event of at most {LONGEST_EVENT} characters as JSON, found {size}")
        return self


class EventsBody(Strict):
    """What a user has just done; the next recommendation rests on it."""

    user_id: Id
    events: tuple[LiveEventBody, ...] = Field(
        min_length=1, max_length=MAX_LIVE_EVENTS, description="one without timestamp happens now"
    )

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": "196", "events": [{"item_id": "50", "rating": 5}]}]}
    )

    @field_validator("user_id")
    @classmethod
    def _is_short(cls, user_id: str) -> str:
        if len(user_id) > LONGEST_ID:
            raise ValueError(f"expected at most {LONGEST_ID} characters, found {len(user_id)}")
        return user_id

    def live_events(self, now: float) -> list[LiveEvent]:
        """Those without a time happen now, a microsecond after each other: two that are alike are not the same."""
        return [
            LiveEvent(
                event.item_id,
                now + place / MICROSECONDS if event.timestamp is None else event.timestamp,
                dict(event.model_extra or {}),
                event.event_id,
            )
            for place, event in enumerate(self.events)
        ]


class ItemBody(Strict):
    """An item as it is from now on: a column that is not given is missing."""

    item_id: Id
    features: Features = Field(description='columns of the items file: {"title": ..., "image": [0.1, ...]}')
    display: str | None = Field(None, description="what to show people; if left out, the first column of the text")


class ItemsBody(Strict):
    items: tuple[ItemBody, ...] = Field(min_length=1, max_length=MAX_ITEMS)

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"item_id": "1683", "features": {"title": "Alien", "year": 1979}}]}]}
    )

    def changes(self) -> tuple[Item, ...]:
        return tuple(Item(one.item_id, one.features, one.display) for one in self.items)


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


def explain(error: dict[str, Any], body: type[BaseModel] | None) -> tuple[str, str | None]:
    """One sentence and the field of a pydantic error; `body` is the model that the request's body should have been."""
    where = [str(part) for part in error["loc"][1:]]  # the first part says body, query or path
    field = ".".join(where) or None
    if error["type"] == "extra_forbidden":
        return f"unknown key '{field}'; {nearest(where[-1], _keys(body, where[:-1]))}", field
    if error["type"] == "missing":
        return (f"'{field}' is missing" if field else "the body is missing: expected a JSON object"), field
    return (f"'{field}': " if field else "the body: ") + _complaint(error), field


def _complaint(error: dict[str, Any]) -> str:
    """What was expected and found, in the words of JSON rather than of Python."""
    value, limits = error.get("input"), error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(limits["error"])
        case "greater_than_equal":
            return f"expected at least {limits['ge']:g}, found {value}"
        case "less_than_equal":
            return f"expected at most {limits['le']:g}, found {value}"
        case "too_short" | "too_long":
            bound = f"at least {limits['min_length']}" if "min_length" in limits else f"at most {limits['max_length']}"
            return f"expected {bound} entries, found {limits['actual_length']}"
    for prefix, expected in EXPECTED.items():
        if error["type"].startswith(prefix):
            return f"expected {expected}, found {_found(value)}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _found(value: object) -> str:
    """A short value as JSON writes it; of a long one its kind, or it would drown the sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if isinstance(value, (str, int, float)) and len(text) <= 60 else _json_kind(value)


def _keys(model: Any, where: Sequence[str]) -> set[str]:
    """The keys of the object at `where` in a body."""
    for part in where:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)  # another part is a place in a list or a view
    return set(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else set()


def _model_in(annotation: Any) -> Any:
    """The model that an annotation such as `tuple[EventBody, ...] | None` holds, else None."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
