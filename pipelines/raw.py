"""Raw files as a stream of chunks: CSV, TSV, JSONL, Parquet."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from mvrec_core.config import Source
from mvrec_core.errors import DataError, nearest

ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BLOCK = 16 << 20  # bytes of a CSV block
LINES = 50_000  # of JSONL in a chunk
LOOKED_AT = 1000  # lines of JSONL that show which keys there are


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file under our column names.

    frame: the needed columns; rows: their row numbers in the file, from 1
    whole: the JSON of given positions of the frame, every column of the file included
    bad:   rows that the format itself cannot hold: row number, text, reason
    """

    frame: pl.DataFrame
    rows: pl.Series
    whole: Callable[[Sequence[int]], list[str]]
    bad: list[tuple[int, str, str]] = field(default_factory=list)


def find(source: Source, key: str) -> list[str]:
    """The files of a source in the order of its patterns, each pattern's sorted by name. Raises DataError."""
    files: list[str] = []
    for pattern in source.paths:
        found = [pattern] if Path(pattern).is_file() else sorted(f for f in glob.glob(pattern) if Path(f).is_file())
        if not found:
            raise DataError(f"{key}.path: no such file: '{pattern}'")
        files += found
    return list(dict.fromkeys(files))  # overlapping patterns give a file once


def kind(file: str, source: Source) -> str:
    ending = Path(file).suffix.lower()
    if source.format is None and ending not in ENDINGS:
        raise DataError(f"{file}: its format cannot be told from '{ending}'; set format to csv, tsv, jsonl or parquet")
    return source.format or ENDINGS[ending]


def check_columns(file: str, source: Source, needed: dict[str, str], key: str) -> None:
    """Raises DataError naming the file, the column that it lacks, and the nearest one that it has."""
    names = _guarded(file, lambda: _header(file, kind(file, source)))
    for ours, theirs in needed.items():
        if theirs not in names:
            raise DataError(f"{file}: expected a column '{theirs}' ({key}.columns.{ours}); {nearest(theirs, names)}")


def chunks(file: str, source: Source, needed: dict[str, str]) -> Iterator[Chunk]:
    """The file's rows in order. Raises DataError for a file that is not what its format says."""
    reader = {"csv": _csv, "tsv": _csv, "jsonl": _jsonl, "parquet": _parquet}[kind(file, source)]
    stream = reader(file, kind(file, source), needed)
    while (chunk := _guarded(file, lambda: next(stream, None))) is not None:
        yield chunk


def _guarded(file: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
    except (pa.ArrowInvalid, OSError) as error:
        what = str(error).splitlines()[0]
        if "UTF8" in what or "UTF-8" in what:
            raise DataError(f"{file}: expected UTF-8: {what}") from None
        raise DataError(f"{file}: cannot be read: {what}") from None


def _header(file: str, form: str) -> list[str]:
    if form == "parquet":
        return list(pq.read_schema(file).names)
    with open(file, encoding="utf-8-sig") as lines:
        if form == "jsonl":
            keys: dict[str, None] = {}
            for _, line in zip(range(LOOKED_AT), lines, strict=False):
                row, _ = _parse(line)
                keys.update(dict.fromkeys(row or ()))
            return list(keys)
        first = lines.readline()
    if not first.strip():
        raise DataError(f"{file}: the file is empty; expected a header line")
    table = csv.read_csv(pa.BufferReader(first.encode()), parse_options=_parsing(form, []))
    return table.column_names


def _parsing(form: str, bad: list[tuple[int, str, str]]) -> csv.ParseOptions:
    def refuse(row: Any) -> str:
        reason = f"expected {row.expected_columns} columns, found {row.actual_columns}"
        bad.append((row.number - 1, row.text, reason))  # the header is number 1
        return "skip"

    quote = False if form == "tsv" else '"'
    return csv.ParseOptions(
        delimiter="\t" if form == "tsv" else ",",
        quote_char=quote,
        newlines_in_values=form == "csv",
        invalid_row_handler=refuse,
    )


def _csv(file: str, form: str, needed: dict[str, str]) -> Iterator[Chunk]:
    bad: list[tuple[int, str, str]] = []
    names = _header(file, form)
    reader = csv.open_csv(
        file,
        read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK),  # one thread: it numbers the bad rows
        parse_options=_parsing(form, bad),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        ),
    )
    done, skipped, told = 0, set(), 0
    for batch in reader:
        new, told = bad[told:], len(bad)
        skipped |= {row for row, _, _ in new}
        numbers: list[int] = []
        while len(numbers) < batch.num_rows:
            done += 1
            if done not in skipped:
                numbers.append(done)
        table = pa.Table.from_batches([batch])
        yield Chunk(_ours(table, needed), pl.Series(numbers, dtype=pl.Int64), _whole(table), new)
    if bad[told:]:
        none = pa.table({name: pa.array([], pa.string()) for name in names})
        yield Chunk(_ours(none, needed), pl.Series([], dtype=pl.Int64), _whole(none), bad[told:])


def _parquet(file: str, form: str, needed: dict[str, str]) -> Iterator[Chunk]:
    source = pq.ParquetFile(file)
    done = 0
    for group in range(source.num_row_groups):
        table = source.read_row_group(group, columns=sorted(set(needed.values())))

        def whole(positions: Sequence[int], group: int = group) -> list[str]:
            return _whole(source.read_row_group(group))(positions)

        rows = pl.Series(range(done + 1, done + table.num_rows + 1), dtype=pl.Int64)
        done += table.num_rows
        yield Chunk(_ours(table, needed), rows, whole)


def _jsonl(file: str, form: str, needed: dict[str, str]) -> Iterator[Chunk]:
    with open(file, encoding="utf-8-sig") as lines:
        number = 0
        while True:
            kept: list[dict[str, Any]] = []
            rows: list[int] = []
            bad: list[tuple[int, str, str]] = []
            for line in lines:
                number += 1
                row, reason = _parse(line)
                row, reason = (None, why) if row and (why := _odd(row, needed)) else (row, reason)
                if row is None:
                    bad.append((number, line.rstrip("\n"), reason))
                else:
                    kept.append(row)
                    rows.append(number)
                if len(kept) + len(bad) == LINES:
                    break
            if not kept and not bad:
                return
            frame = pl.DataFrame({ours: _column([row.get(theirs) for row in kept]) for ours, theirs in needed.items()})

            def whole(positions: Sequence[int], kept: list[dict[str, Any]] = kept) -> list[str]:
                return [json.dumps(kept[place], ensure_ascii=False) for place in positions]

            yield Chunk(frame, pl.Series(rows, dtype=pl.Int64), whole, bad)


def _parse(line: str) -> tuple[dict[str, Any] | None, str]:
    try:
        row = json.loads(line)
        if "\\u" in line:  # half a surrogate pair is valid JSON but no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None, "not a JSON object"
    return (row, "") if isinstance(row, dict) else (None, "not a JSON object")


def _odd(row: dict[str, Any], needed: dict[str, str]) -> str | None:
    """The reason to refuse a row whose id or timestamp is a list, an object or a truth value."""
    keys = [ours for ours in ("user_id", "item_id", "timestamp") if ours in needed]
    odd = [ours for ours in keys if isinstance(row.get(needed[ours]), (list, dict, bool))]
    return f"{odd[0]} is not text or a number" if odd else None


def _column(values: list[Any]) -> pl.Series:
    """JSON values of one key as text, or as lists of text where any of them is a list."""
    if any(isinstance(value, list) for value in values):
        lists = [None if v is None else [_scalar(part) for part in (v if isinstance(v, list) else [v])] for v in values]
        return pl.Series(lists, dtype=pl.List(pl.String))
    return pl.Series([_scalar(value) for value in values], dtype=pl.String)


def _scalar(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _ours(table: pa.Table, needed: dict[str, str]) -> pl.DataFrame:
    return pl.DataFrame({ours: pl.Series(pl.from_arrow(table[theirs])) for ours, theirs in needed.items()})


def _whole(table: pa.Table) -> Callable[[Sequence[int]], list[str]]:
    return lambda positions: [
        json.dumps(row, ensure_ascii=False, default=str) for row in table.take(list(positions)).to_pylist()
    ]
