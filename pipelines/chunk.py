"""Some rows of a raw file under our column names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from mvrec_core.data import Source

IDS = ("user_id", "item_id", "timestamp")


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file under our column names.

    frame: the columns asked for; rows: their row numbers in the file, int64 from 1, blank lines not counted
    whole: the JSON of given positions of the frame, every column of the file included
    bad:   rows that the format itself cannot hold: row number, text, reason
    """

    frame: pl.DataFrame
    rows: pl.Series
    whole: Callable[[Sequence[int]], list[str]]
    bad: list[tuple[int, str, str]] = field(default_factory=list)


def theirs_of(source: Source, names: Iterable[str]) -> dict[str, str]:
    """Our names that the file gives -> the file's."""
    given = {name: source.columns.get(name, name) for name in names if name not in source.constants}
    return {ours: theirs for ours, theirs in given.items() if theirs is not None}


def frame_of(source: Source, names: Sequence[str], given: Mapping[str, pl.Series], rows: int) -> pl.DataFrame:
    """Our columns, from the values of the file's."""
    columns = {ours: given[theirs] for ours, theirs in theirs_of(source, names).items()}
    for name in names:
        if name not in columns:
            literal = str(source.constants[name]) if name in source.constants else None
            columns[name] = pl.repeat(literal, rows, dtype=pl.String, eager=True)
    return pl.DataFrame({name: columns[name] for name in names})
