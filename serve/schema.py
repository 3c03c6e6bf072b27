"""What the HTTP interface takes: bodies, and what is wrong with one in a sentence that names the field.

A body is checked here, on the border, before it meets a batch. Ids may be JSON strings or integers and are strings from
here on; a timestamp is Unix seconds or an ISO-8601 string (UTC where no zone is named), and Unix seconds from here on.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Sequence
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
from mvrec_core.requests import MICROSECONDS, Candidate, Event, Item, Request
from serve.sessions import LiveEvent

MAX_CANDIDATES = 1000
MAX_ITEMS = 200  # that one call may change: their texts are encoded before it is answered
MAX_LIVE_EVENTS = 1000  # that one call may append
LONGEST_ID, LONGEST_EVENT = 256, 2000  # characters of what is kept, as JSON
MAX_EXPLAINED = 100  # items of an answer: each costs as much as many answers
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
