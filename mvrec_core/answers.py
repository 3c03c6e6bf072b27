"""What a Recommender gives back."""

from __future__ import annotations

from dataclasses import dataclass

from mvrec_core.explanations import Explanation


@dataclass(frozen=True)
class Recommended:
    item_id: str
    score: float
    rank: int  # from 1
    display: str | None
    explanation: Explanation | None = None  # where it was asked for


@dataclass(frozen=True)
class Withheld:
    """An item that a rule kept from a list: it would have stood above the list's last one."""

    item_id: str
    why: str


@dataclass(frozen=True)
class Answer:
    """rung: "history", "profile" or "popularity", what the answer rests on; unknown_items: of the request's events;
    views: the mean view weights of the user's steps, where an explanation was asked for."""

    rung: str
    items: list[Recommended]
    unknown_items: int
    views: dict[str, float] | None = None
    withheld: tuple[Withheld, ...] = ()


@dataclass(frozen=True)
class Scored:
    item_id: str | None
    score: float | None  # None where the id is unknown
    probability: float | None
