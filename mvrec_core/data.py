"""The branch `data` of a configuration: where the raw rows are, which of them count, and how they are split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mvrec_core.node import Node

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]


class Source(Node):
    """One table of the raw input."""

    path: str | tuple[str, ...]  # files, folders, glob patterns, object-store URIs
    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = None  # None: told from the file's ending
    encoding: str = "utf-8"  # of text files
    columns: dict[str, str | None] = {}  # our name -> the file's, or null: there is none; one not named keeps its name
    constants: dict[str, str | int | float] = {}  # our name -> the value of every row
    timestamp_unit: TimeUnit = "s"

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


class TableSource(Source):
    """Items or users. Several rows of one id are its history, dated where columns maps `timestamp`."""

    conflicts: Literal["newest", "most_frequent", "error"] = "newest"  # rows of an id that differ; undated: the last
    before: str | None = None  # ISO-8601: dated rows from then on are not used; None: split.valid_from, if there is one

    @model_validator(mode="after")
    def _before_needs_dates(self) -> TableSource:
        if self.before is not None and self.columns.get("timestamp") is None:
            raise ValueError("before needs dated rows: map columns.timestamp")
        return self


class HeldOut(Node):
    """What every split can do: a share of the items, by a hash of their ids, is new at test: their events before are
    left out."""

    new_items: float = Field(0.0, ge=0, lt=1)


class LeaveOneOut(HeldOut):
    """Of each user with at least three events the last is test, the one before validation."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    n: Literal[1] = 1


class LastN(HeldOut):
    """Of each user with more than 2 n events the last n are test, the n before validation."""

    kind: Literal["last_n"]
    n: int = Field(ge=1)


class Temporal(HeldOut):
    """Global time cuts, as ISO-8601 instants: [.., valid_from) train, [valid_from, test_from) valid, the rest test."""

    kind: Literal["temporal"]
    valid_from: str
    test_from: str


class Range(Node):
    """Numbers from min to max, both included."""

    min: float | None = None
    max: float | None = None


class Rate(Node):
    """More than `events` events within `seconds` is more than a person does."""

    events: int = Field(ge=1)
    seconds: float = Field(gt=0)


class Core(Node):
    """Fewest events of a user and of an item, counted again until none falls below."""

    users: int = Field(1, ge=1)
    items: int = Field(1, ge=1)
    over: Literal["train", "all"] = "train"  # the events that count; with "all", test rows decide what training sees


class Clean(Node):
    """Which valid events are left out, in this order."""

    keep: dict[str, tuple[str, ...]] = {}  # column -> the only values to keep
    ranges: dict[str, Range] = {}  # column -> the only numbers to keep
    since: str | None = None  # ISO-8601: earlier events are left out
    until: str | None = None  # ISO-8601: events from then on are left out
    duplicates: bool = False  # rows that repeat a row in every column that is read
    repeats: bool = False  # events of the item of the event before
    max_rate: Rate | None = None  # users who go beyond it are left out
    max_history: int | None = Field(None, ge=1)  # older train events of a user than the newest so many
    core: Core | None = None


class Data(Node):
    events: tuple[Source, ...] = Field(min_length=1)  # one source, or several that make one history
    items: TableSource | None = None
    users: TableSource | None = None
    clean: Clean = Clean()
    split: Annotated[LeaveOneOut | LastN | Temporal, Field(discriminator="kind")] = LeaveOneOut()
    buckets: int | None = Field(None, ge=1, le=4096)  # None: a power of two, by the number of rows

    @field_validator("events", mode="before")
    @classmethod
    def _one_source_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict) else value
