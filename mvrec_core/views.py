"""The branch `views` of a configuration: what is read of items, events and users."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mvrec_core.node import Node


class IdView(Node):
    """Who the item is: an embedding per catalogue entry."""

    kind: Literal["id"]
    level: Literal["item"] = "item"


class TextView(Node):
    """What the item's text says: columns joined as "column: value", read by a BERT-family model."""

    kind: Literal["text"]
    level: Literal["item"] = "item"
    columns: tuple[str, ...] = Field(min_length=1)
    clean: tuple[Literal["html", "nfc", "control"], ...] = ("html", "nfc", "control")  # entities, Unicode form, ...


class CategoryView(Node):
    """A single- or multi-valued category."""

    kind: Literal["category"]
    level: Literal["item", "event", "user"]
    column: str
    separator: str | None = None  # how several values share a text cell; lists need none


class NumberView(Node):
    """A quantity, standardised by the mean and deviation of train."""

    kind: Literal["number"]
    level: Literal["item", "event", "user"]
    column: str


class TimeView(Node):
    """When the event happened: gap before it, hour, weekday; the encoder also sees the gap to now."""

    kind: Literal["time"]
    level: Literal["event"] = "event"


class VectorView(Node):
    """What another model made of the item's image, sound or place in a graph: numbers, as many for each item."""

    kind: Literal["vector"]
    level: Literal["item"] = "item"
    column: str
    separator: str | None = None  # between the numbers of a text cell; None: blanks; lists need none
    path: str | tuple[str, ...] | None = None  # files of its own, with the columns `key` and `column`; None: the items
    key: str = "item_id"  # of these files: the item

    @property
    def paths(self) -> tuple[str, ...]:
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path


class GraphView(Node):
    """The company an item keeps in histories, made of train events: see graph.py."""

    kind: Literal["graph"]
    level: Literal["item"] = "item"
    size: int = Field(64, ge=1)  # numbers of a vector
    window: int = Field(5, ge=1, le=40)  # steps apart, at most, of two items that keep company


View = Annotated[
    IdView | TextView | CategoryView | NumberView | TimeView | VectorView | GraphView, Field(discriminator="kind")
]
OF_EVENTS = ("id", "graph")  # kinds of item-level views that follow from events: prepare stores no values of them
