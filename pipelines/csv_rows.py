"""The rows of CSV and TSV."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as csv

from mvrec_core.data import Source
from mvrec_core.errors import DataError
from pipelines import decoded
from pipelines.cells import as_json, distinct, read
from pipelines.chunk import Chunk, frame_of, theirs_of
from pipelines.decoded import open_for_threads, open_text
from pipelines.locations import form_of

HEAD = 1 << 20  # bytes of text that show the columns


def header(file: str, source: Source) -> list[str]:
    with open_text(file, source) as stream:
        text = codecs.getincrementaldecoder("utf-8")().decode(stream.read(HEAD))  # without a letter that HEAD cuts
    if not text.strip("\ufeff\r\n"):
        raise DataError(f"{file}: the file is empty; expected a header line")
    content = f"{text}\n".encode()
    one_block = csv.ReadOptions(use_threads=False, block_size=len(content) + 1)
    return csv.read_csv(pa.BufferReader(content), one_block, _parsing(file, source, [])).column_names


def _parsing(file: str, source: Source, bad: list[tuple[int, str, str]]) -> csv.ParseOptions:
    def refuse(row: Any) -> str:
        reason = f"expected {row.expected_columns} columns, found {row.actual_columns}"
        bad.append((row.number - 1, row.text, reason))  # the header is number 1
        return "skip"

    tabs = form_of(file, source)[0] == "tsv"
    return csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
        invalid_row_handler=refuse,
    )


def chunks(file: str, source: Source, names: Sequence[str]) -> Iterator[Chunk]:
    columns = header(file, source)
    bad: list[tuple[int, str, str]] = []
    try:
        reader = csv.open_csv(
            open_for_threads(file, source),
            csv.ReadOptions(use_threads=False, block_size=decoded.BLOCK),  # one thread: it numbers the bad rows
            _parsing(file, source, bad),
            csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):  # a header without an end of line
            return
        raise
    with reader:  # closed, it leaves no thread of Arrow's at work, which ends a process badly
        done, told, skipped = 0, 0, np.zeros(0, np.int64)  # skipped: bad rows after `done`
        last = pa.RecordBatch.from_pylist([], reader.schema)  # for bad rows after the last good one
        for batch in itertools.chain(reader, [last]):
            new = bad[told:]
            told += len(new)
            skipped = np.r_[skipped, np.array([row for row, _, _ in new], np.int64)]
            rows = np.arange(done + 1, done + 1 + batch.num_rows + len(skipped))
            rows = np.setdiff1d(rows, skipped, assume_unique=True)[: batch.num_rows] if len(skipped) else rows
            done = int(rows[-1]) if len(rows) else done
            skipped = skipped[skipped > done]
            if batch.num_rows or new:
                table = pa.Table.from_batches([batch]).rename_columns(distinct(columns))
                given = {theirs: read(table[theirs]) for theirs in theirs_of(source, names).values()}
                frame = frame_of(source, names, given, len(rows))
                yield Chunk(frame, pl.Series(rows, dtype=pl.Int64), partial(as_json, table), new)
