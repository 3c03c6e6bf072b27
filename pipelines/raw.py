"""Raw files: which there are, what columns they have, and their rows in chunks that fit memory.

A chunk is Arrow columns under our names. Rows are numbered from 1 after the header; blank lines do not count.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mvrec_core.config import Source
from mvrec_core.errors import DataError, nearest
from mvrec_core.schema import ITEM, TIMESTAMP, USER

_ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 1 << 18
_SAMPLE_LINES = 1000  # of a JSONL file, to learn its fields


@dataclass(frozen=True)
class RawFile:
    name: str  # as the configuration or its pattern names it
    path: str  # absolute
    format: str
    fields: dict[str, str]  # our name -> the file's name, of the columns that are read


@dataclass(frozen=True)
class Chunk:
    """n rows that could be told apart, and between them lines that could not."""

    rows: np.ndarray  # int64 [n], row numbers
    columns: dict[str, pa.Array]  # our name -> n values
    to_json: Callable[[np.ndarray], list[str]]  # positions in `rows` -> those rows, whole, as JSON
    broken: list[tuple[int, str, str]]  # row number, reason, the line as JSON


def open_source(source: Source, key: str, needed: Iterable[str]) -> list[RawFile]:
    """The files of a source in the order of its patterns, their columns checked; `key` is the source's place in the config.

    Raises DataError: no file, an unknown ending, a column that is missing.
    """
    return [_open_file(name, source, key, set(needed)) for name in _expand(source.paths, key)]


def fingerprint(file: RawFile) -> dict[str, Any]:
    """{file, bytes, sha256}."""
    with _reading(file.name), open(file.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": file.name, "bytes": os.path.getsize(file.path), "sha256": digest}


def read_chunks(file: RawFile) -> Iterator[Chunk]:
    """The rows of a file. Raises DataError naming the file where it cannot be read or is not UTF-8."""
    readers = {"csv": _read_delimited, "tsv": _read_delimited, "jsonl": _read_jsonl, "parquet": _read_parquet}
    with _reading(file.name, file.path if file.format != "parquet" else None):
        yield from readers[file.format](file)


def _expand(patterns: Iterable[str], key: str) -> list[str]:
    found: dict[str, None] = {}  # an ordered set: overlapping patterns give a file once
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise DataError(f"{pattern}: no such file (data.{key}.path)")
        found.update(dict.fromkeys(names))
    folder = next((name for name in found if os.path.isdir(name)), None)
    if folder is not None:
        raise DataError(f"{folder}: expected a file, found a directory; a pattern such as {folder}/* reads its files")
    return list(found)


def _open_file(name: str, source: Source, key: str, needed: set[str]) -> RawFile:
    ending = Path(name).suffix.lower()
    form = source.format or _ENDINGS.get(ending)
    if form is None:
        raise DataError(f"{name}: cannot tell its format from '{ending}'; set data.{key}.format")
    with _reading(name, name if form != "parquet" else None):
        present = _header(name, form)
    # a column that the configuration names must exist even where no view reads it: it is a slip otherwise
    for ours in sorted(needed | set(source.columns)):
        theirs = source.columns.get(ours, ours)
        if present.count(theirs) != 1:
            told = f" (our {ours})" if ours != theirs else ""
            problem = f"occurs {present.count(theirs)} times" if theirs in present else "is missing"
            hint = "" if theirs in present else f"; {nearest(theirs, present)}"
            raise DataError(f"{name}: column '{theirs}'{told} {problem}{hint}")
    return RawFile(name, os.path.abspath(name), form, {ours: source.columns.get(ours, ours) for ours in sorted(needed)})


def _header(path: str, form: str) -> list[str]:
    if form == "parquet":
        return pq.read_schema(path).names
    if form == "jsonl":
        return _jsonl_fields(path)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        names = next((row for row in csv.reader(stream, **_dialect(form)) if row), None)
    if names is None:
        raise DataError(f"{path}: expected a header line, found an empty file")
    return names


def _jsonl_fields(path: str) -> list[str]:
    """The keys of the first lines; an optional key may be absent from many of them."""
    fields: dict[str, None] = {}
    lines = 0
    with open(path, encoding="utf-8-sig") as stream:
        for _, line in zip(range(_SAMPLE_LINES), stream, strict=False):
            lines += bool(line.strip())
            row = _parse_line(line)
            fields.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    if not lines:
        raise DataError(f"{path}: expected JSON objects, one a line, found an empty file")
    if not fields:
        raise DataError(f"{path}: expected JSON objects, one a line, found none in the first {lines} lines")
    return list(fields)


def _dialect(form: str) -> dict[str, Any]:
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if form == "tsv" else {"delimiter": ","}


def _read_delimited(file: RawFile) -> Iterator[Chunk]:
    """Every column as text. A row with too few or too many fields is broken."""
    broken: list[tuple[int, str, str]] = []

    def on_broken(row: pa_csv.InvalidRow) -> str:
        reason = f"row has too {'few' if row.actual_columns < row.expected_columns else 'many'} fields"
        broken.append((row.number - 1, reason, _dump(row.text)))  # Arrow counts the header as row 1
        return "skip"

    tsv = file.format == "tsv"
    reader = pa_csv.open_csv(
        file.path,
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=_CHUNK_BYTES),
        parse_options=pa_csv.ParseOptions(
            delimiter="\t" if tsv else ",",
            quote_char=False if tsv else '"',  # in TSV a quote is a character like any other
            newlines_in_values=not tsv,
            invalid_row_handler=on_broken,
        ),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(_header(file.path, file.format), pa.string())),
    )
    next_row, given = 1, 0
    for batch in reader:
        # the handler runs ahead of the batches, so some of the broken rows may lie beyond this one
        skipped = np.array([number for number, _, _ in broken[given:]], np.int64)
        ahead = np.arange(next_row, next_row + batch.num_rows + len(skipped))
        rows = np.setdiff1d(ahead, skipped, assume_unique=True)[: batch.num_rows]
        next_row = int(rows[-1]) + 1 if len(rows) else next_row
        columns = {ours: batch.column(theirs) for ours, theirs in file.fields.items()}
        known, given = broken[given:], len(broken)
        yield Chunk(rows, columns, _table_to_json(batch), known)
        next_row = _after(next_row, known)
    if broken[given:]:
        yield _only_broken(file, broken[given:])


def _read_jsonl(file: RawFile) -> Iterator[Chunk]:
    """Numbers are kept as they are written, so an id of any length is exact."""
    row = 0
    with open(file.path, "rb") as stream:
        while lines := stream.readlines(_CHUNK_BYTES):
            numbers, objects, broken = [], [], []
            for line in lines:  # a parser call a line: only so does one bad line cost one row
                text = line.decode("utf-8-sig" if row == 0 else "utf-8")
                if not text.strip():
                    continue
                row += 1
                parsed = _parse_line(text)
                reason = parsed if isinstance(parsed, str) else _not_plain(parsed, file.fields)
                if reason:
                    broken.append((row, reason, _dump(text.strip() if isinstance(parsed, str) else parsed)))
                else:
                    numbers.append(row)
                    objects.append(parsed)
            columns = {ours: _json_column([o.get(theirs) for o in objects]) for ours, theirs in file.fields.items()}
            yield Chunk(np.array(numbers, np.int64), columns, _objects_to_json(objects), broken)


def _read_parquet(file: RawFile) -> Iterator[Chunk]:
    parquet = pq.ParquetFile(file.path)
    row = 1
    for group in range(parquet.num_row_groups):
        start = 0
        for batch in parquet.iter_batches(_CHUNK_ROWS, row_groups=[group], columns=list(set(file.fields.values()))):
            columns = {ours: batch.column(theirs) for ours, theirs in file.fields.items()}
            yield Chunk(np.arange(row, row + len(batch)), columns, _group_to_json(parquet, group, start), [])
            row, start = row + len(batch), start + len(batch)


def _table_to_json(table: pa.RecordBatch) -> Callable[[np.ndarray], list[str]]:
    return lambda positions: [_dump(row) for row in table.take(pa.array(positions)).to_pylist()]


def _objects_to_json(objects: list[dict[str, Any]]) -> Callable[[np.ndarray], list[str]]:
    return lambda positions: [_dump(objects[position]) for position in positions]


def _group_to_json(parquet: pq.ParquetFile, group: int, start: int) -> Callable[[np.ndarray], list[str]]:
    """Columns that no view reads are fetched only for rows that are rejected."""

    def to_json(positions: np.ndarray) -> list[str]:
        if not len(positions):
            return []
        return [_dump(row) for row in parquet.read_row_group(group).take(pa.array(positions + start)).to_pylist()]

    return to_json


def _only_broken(file: RawFile, broken: list[tuple[int, str, str]]) -> Chunk:
    columns = {ours: pa.array([], pa.string()) for ours in file.fields}
    return Chunk(np.array([], np.int64), columns, lambda positions: [], broken)


def _parse_line(line: str) -> dict[str, Any] | str:
    """A JSON object with its numbers as text, or the reason why it is none."""
    try:
        parsed = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8") if "\\u" in line else None  # half a surrogate pair
    except (ValueError, RecursionError):
        return "line is not valid JSON"
    return parsed if isinstance(parsed, dict) else "line is not a JSON object"


def _not_plain(row: dict[str, Any], fields: dict[str, str]) -> str | None:
    """The reason to reject a row whose id or timestamp is a list, an object or a truth value."""
    odd = (
        ours
        for ours in (USER, ITEM, TIMESTAMP)
        if ours in fields and isinstance(row.get(fields[ours]), (list, dict, bool))
    )
    name = next(odd, None)
    return None if name is None else f"{name} is not text or a number"


def _json_column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) or value is None else [value] for value in values]
        return pa.array([v if v is None else [_json_text(one) for one in v] for v in lists], pa.list_(pa.string()))
    return pa.array([_json_text(value) for value in values], pa.string())


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def _reading(name: str, text_path: str | None = None) -> Iterator[None]:
    """Turns what can go wrong while a file is read into one sentence that names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        line = _line_not_utf8(text_path) if text_path else None
        if line is not None:
            raise DataError(f"{name}: expected UTF-8 text, found another encoding in line {line}") from None
        raise DataError(f"{name}: cannot be read: {' '.join(str(error).split())}") from None


def _line_not_utf8(path: str) -> int | None:
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return number
    except OSError:
        pass
    return None
