"""Raw files as a stream of chunks: CSV, TSV, JSONL, also as .gz or .zst, and Parquet; on disk or in an object store.

find -> check_columns -> pieces (what one task reads) -> chunks (under our column names) -> take (rows again, whole)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mvrec_core.data import Source
from mvrec_core.errors import DataError, nearest
from pipelines import csv_rows, jsonl_rows, parquet_rows
from pipelines.chunk import IDS, Chunk, theirs_of
from pipelines.decoded import guarded
from pipelines.locations import form_of


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, or the row groups [start, stop) of a Parquet file."""

    number: int  # of the file, over all sources, from 0
    source: int
    file: str
    groups: tuple[int, int] | None = None


def check_columns(
    file: str, source: Source, names: Sequence[str], key: str, keys: Mapping[str, str] | None = None
) -> None:
    """Raises DataError naming the file, the column that it lacks, and the nearest one that it has. keys: our name ->
    the configuration's key for it, if that is not in `columns` below `key`."""
    fields = guarded(file, source, lambda: _fields(file, source))
    if not fields and form_of(file, source)[0] == "jsonl":
        return  # no rows, no keys
    for ours, theirs in theirs_of(source, names).items():
        kinds = [kind for name, kind in fields if name == theirs]
        where = f"column '{theirs}' ({(keys or {}).get(ours, f'{key}.columns.{ours}')})"
        if not kinds:
            raise DataError(f"{file}: expected a {where}; {nearest(theirs, {name for name, _ in fields})}")
        if len(kinds) > 1:
            raise DataError(f"{file}: expected one {where}, found {len(kinds)}")
        if ours in IDS and (pa.types.is_nested(kinds[0]) or pa.types.is_boolean(kinds[0])):
            raise DataError(f"{file}: {where}: expected text or numbers, found {kinds[0]}")


def pieces(sources: Sequence[Source], files: Sequence[Sequence[str]]) -> list[Piece]:
    """The files of each source in order, a large Parquet file in several pieces. Raises DataError."""
    pairs = [(place, file) for place, names in enumerate(files) for file in names]
    return [
        Piece(number, place, file, groups)
        for number, (place, file) in enumerate(pairs)
        for groups in _shares(file, sources[place])
    ]


def chunks(file: str, source: Source, names: Sequence[str], groups: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """The file's rows in order under these names of ours; of a Parquet file those of the row groups [start, stop).

    A column is text, or from Parquet also numbers, dates, times; or lists of these, where a cell holds several values.
    Raises DataError for a file that is not what its format or encoding says.
    """
    form, _ = form_of(file, source)
    if form == "parquet":
        stream = parquet_rows.chunks(file, source, names, groups)
    else:
        stream = (jsonl_rows if form == "jsonl" else csv_rows).chunks(file, source, names)
    while (chunk := guarded(file, source, lambda: next(stream, None))) is not None:
        yield chunk


def take(file: str, source: Source, rows: Sequence[int]) -> list[str]:
    """The JSON of the whole rows with these numbers, which are sorted and distinct. Raises DataError."""
    wanted = np.asarray(rows, np.int64)
    found: list[str] = []
    for chunk in chunks(file, source, ()):
        if len(found) == len(wanted):
            break
        places = np.flatnonzero(np.isin(chunk.rows.to_numpy(), wanted, assume_unique=True))
        found += chunk.whole(places.tolist()) if len(places) else []
    if len(found) != len(wanted):
        raise DataError(f"{file}: expected {len(wanted)} of its rows again, found {len(found)}: has it changed?")
    return found


def _shares(file: str, source: Source) -> list[tuple[int, int]] | list[None]:
    """The row groups of each piece of a file; None for a whole file."""
    if form_of(file, source)[0] != "parquet":
        return [None]
    return parquet_rows.shares(file, source)


def _fields(file: str, source: Source) -> list[tuple[str, pa.DataType]]:
    form, _ = form_of(file, source)
    if form == "parquet":
        return parquet_rows.fields(file)
    names = jsonl_rows.keys(file, source) if form == "jsonl" else csv_rows.header(file, source)
    return [(name, pa.string()) for name in names]
