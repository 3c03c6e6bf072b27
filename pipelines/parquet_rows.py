"""The rows of Parquet files, which are large: a few row groups at a time, and of these only the columns asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.data import Source
from mvrec_core.places import place
from pipelines.cells import as_json, read
from pipelines.chunk import Chunk, frame_of, theirs_of
from pipelines.decoded import guarded

ROWS = 500_000  # in a chunk, at most
BYTES = 256 << 20  # in a chunk, about, at most
PIECE = 1_000_000  # rows of a large file for one task, about


def fields(file: str) -> list[tuple[str, pa.DataType]]:
    return [(column.name, column.type) for column in pq.ParquetFile(seekable(file)).schema_arrow]


def shares(file: str, source: Source) -> list[tuple[int, int]] | list[None]:
    """The row groups of each piece of a file; None for a whole file."""
    metadata = guarded(file, source, lambda: pq.ParquetFile(seekable(file)).metadata)
    runs = _runs(_group_rows(metadata), range(metadata.num_row_groups), PIECE)
    return [(run.start, run.stop) for run in runs] if len(runs) > 1 else [None]


def seekable(file: str) -> pa.NativeFile:
    system, path, _ = place(file)
    return system.open_input_file(path)


def _group_rows(metadata: pq.FileMetaData) -> list[int]:
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _runs(rows: Sequence[int], groups: range, limit: int) -> list[range]:
    """Row groups that follow each other, together as many as keep within so many rows, at least one."""
    runs: list[range] = []
    for group in groups:
        if runs and sum(rows[g] for g in runs[-1]) + rows[group] <= limit:
            runs[-1] = range(runs[-1].start, group + 1)
        else:
            runs.append(range(group, group + 1))
    return runs


def chunks(file: str, source: Source, names: Sequence[str], groups: tuple[int, int] | None) -> Iterator[Chunk]:
    content = pq.ParquetFile(seekable(file))
    group_rows = _group_rows(content.metadata)
    start, stop = groups or (0, len(group_rows))
    columns = sorted(set(theirs_of(source, names).values()))
    done = sum(group_rows[:start])
    names_there = content.schema_arrow.names
    unique = len(set(names_there)) == len(names_there)
    others = [name for name in names_there if name not in columns] if unique else None
    for run in _runs(group_rows, range(start, stop), ROWS):
        count = sum(group_rows[group] for group in run)
        weight = sum(content.metadata.row_group(group).total_byte_size for group in run)
        step = min(ROWS, max(1, count * BYTES // max(1, weight)))
        needed, rest = _Run(content, run, step, columns), _Run(content, run, step, others)
        for first in range(0, count, step):
            span = first, min(first + step, count)
            table = needed.rows(*span) if columns else pa.table({})
            given = {theirs: read(table[theirs]) for theirs in columns}
            rows = pl.int_range(done + span[0] + 1, done + span[1] + 1, dtype=pl.Int64, eager=True)

            def whole(
                positions: Sequence[int], table: pa.Table = table, rest: _Run = rest, span: tuple[int, int] = span
            ) -> list[str]:
                def columns_too() -> pa.Table:  # only the columns that were not read already
                    every = rest.rows(*span) if others != [] else pa.table({})
                    if others is None:
                        return every
                    return pa.table({name: (table if name in columns else every)[name] for name in names_there})

                return guarded(file, source, lambda: as_json(columns_too(), positions))

            yield Chunk(frame_of(source, names, given, len(rows)), rows, whole)
        done += count


class _Run:
    """The rows of some row groups by their place among them, read on in order; to go back is to start again."""

    def __init__(self, content: pq.ParquetFile, groups: range, step: int, columns: Sequence[str] | None):
        self.read = lambda: content.iter_batches(step, list(groups), columns, use_threads=False)
        self.start_again()

    def start_again(self) -> None:
        self.batches: Iterator[pa.RecordBatch] = self.read()
        self.held: list[pa.RecordBatch] = []
        self.first = 0  # place of the first row held

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows [start, stop)."""
        if start < self.first:
            self.start_again()
        while self.first + sum(map(len, self.held)) < stop:
            self.held.append(next(self.batches))
            while self.held and self.first + len(self.held[0]) <= start:
                self.first += len(self.held.pop(0))
        return pa.Table.from_batches(self.held).slice(start - self.first, stop - start)
