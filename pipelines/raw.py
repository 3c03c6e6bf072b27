"""Raw files as a stream of chunks: CSV, TSV, JSONL, also as .gz or .zst, and Parquet; on disk or in an object store.

find -> check_columns -> pieces (what one task reads) -> chunks (under our column names) -> take (rows again, whole)
"""

from __future__ import annotations

import base64
import codecs
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.json
import pyarrow.parquet as pq

from mvrec_core.config import Source
from mvrec_core.errors import ConfigError, DataError, nearest
from pipelines.locations import first_line, form_of, place

IDS = ("user_id", "item_id", "timestamp")
BLOCK = 16 << 20  # bytes of text in a chunk
HEAD = 1 << 20  # bytes of text that show the columns
LOOKED_AT = 1000  # lines of JSONL that show which keys there are and what they hold
ROWS = 500_000  # of Parquet in a chunk, at most
BYTES = 256 << 20  # of Parquet in a chunk, about, at most
PIECE = 1_000_000  # rows of a large Parquet file for one task, about
NO_OBJECT = "not a JSON object"
LIST = pa.list_(pa.string())
AS_WRITTEN = json.JSONDecoder(parse_float=str, parse_constant=str)


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
    fields = _guarded(file, source, lambda: _fields(file, source))
    if not fields and form_of(file, source)[0] == "jsonl":
        return  # no rows, no keys
    for ours, theirs in _theirs(source, names).items():
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
        stream = _parquet(file, source, names, groups)
    else:
        stream = (_jsonl if form == "jsonl" else _csv)(file, source, names)
    while (chunk := _guarded(file, source, lambda: next(stream, None))) is not None:
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


# columns and errors


def _theirs(source: Source, names: Iterable[str]) -> dict[str, str]:
    """Our names that the file gives -> the file's."""
    given = {name: source.columns.get(name, name) for name in names if name not in source.constants}
    return {ours: theirs for ours, theirs in given.items() if theirs is not None}


def _frame(source: Source, names: Sequence[str], given: Mapping[str, pl.Series], rows: int) -> pl.DataFrame:
    """Our columns, from the values of the file's."""
    columns = {ours: given[theirs] for ours, theirs in _theirs(source, names).items()}
    for name in names:
        if name not in columns:
            literal = str(source.constants[name]) if name in source.constants else None
            columns[name] = pl.repeat(literal, rows, dtype=pl.String, eager=True)
    return pl.DataFrame({name: columns[name] for name in names})


def _fields(file: str, source: Source) -> list[tuple[str, pa.DataType]]:
    form, _ = form_of(file, source)
    if form == "parquet":
        return [(column.name, column.type) for column in pq.ParquetFile(_seekable(file)).schema_arrow]
    if form == "jsonl":
        with _text(file, source) as stream:
            lines = _lines(next(_blocks(stream, HEAD), b""))
        keys = dict.fromkeys(key for line in lines.head(LOOKED_AT) for key in _parse(line) or ())
        return [(key, pa.string()) for key in keys]
    return [(name, pa.string()) for name in _header(file, source)]


def _guarded(file: str, source: Source, read: Callable[[], Any]) -> Any:
    try:
        try:
            return read()
        except (UnicodeError, pa.ArrowInvalid) as error:
            problem = first_line(error)
            if "straddling" in problem:
                raise DataError(f"{file}: a row is longer than {BLOCK >> 20} MB; is a quote left open?") from None
            raise DataError(f"{file}: {_misfit(file, source) or f'cannot be read: {problem}'}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


def _misfit(file: str, source: Source) -> str | None:
    """Where a text file leaves its encoding, if it does."""
    form, codec = form_of(file, source)
    if form == "parquet":
        return None
    encoding = _encoding(file, source)
    expected = f"expected {encoding.upper()} (set encoding, e.g. encoding: gb18030)"
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    system, path, _ = place(file)
    with system.open_input_stream(path, compression=codec) as stream:
        while True:
            data = stream.read(BLOCK)
            try:
                line += decoder.decode(data, final=not data).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                return f"line {line}: {expected}, found byte 0x{error.object[error.start]:02x}"
            except UnicodeError as error:
                return f"{expected}: {first_line(error)}"
            if not data:
                return None


# text


def _text(file: str, source: Source) -> pa.NativeFile:
    """A text file's content as UTF-8."""
    encoding = _encoding(file, source)
    system, path, _ = place(file)
    stream = system.open_input_stream(path, compression=form_of(file, source)[1])
    return stream if encoding == "utf-8" else pa.transcoding_input_stream(stream, encoding, "utf-8")


def _encoding(file: str, source: Source) -> str:
    """What Python calls the source's encoding. Raises ConfigError."""
    try:
        "a".encode(source.encoding)
        return codecs.lookup(source.encoding).name.removesuffix("-sig")
    except LookupError:
        known = "expected a name such as utf-8 or gb18030"
        raise ConfigError(f"{file}: unknown encoding '{source.encoding}'; {known}") from None


def _text_for_threads(file: str, source: Source) -> pa.NativeFile:
    """The same, with no Python in it: where Arrow's threads decode, a reader that is dropped half-way can hang for ever
    on the interpreter's lock. So text of another encoding passes through an unnamed file on disk."""
    if _encoding(file, source) == "utf-8":
        return _text(file, source)
    with _text(file, source) as stream, tempfile.NamedTemporaryFile() as copy:
        while data := stream.read(BLOCK):
            copy.write(data)
        copy.flush()
        return pa.OSFile(copy.name)


# CSV and TSV


def _header(file: str, source: Source) -> list[str]:
    with _text(file, source) as stream:
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


def _csv(file: str, source: Source, names: Sequence[str]) -> Iterator[Chunk]:
    header = _header(file, source)
    bad: list[tuple[int, str, str]] = []
    try:
        reader = csv.open_csv(
            _text_for_threads(file, source),
            csv.ReadOptions(use_threads=False, block_size=BLOCK),  # one thread: it numbers the bad rows
            _parsing(file, source, bad),
            csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False),
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
                table = pa.Table.from_batches([batch]).rename_columns(_distinct(header))
                given = {theirs: _read(table[theirs]) for theirs in _theirs(source, names).values()}
                frame = _frame(source, names, given, len(rows))
                yield Chunk(frame, pl.Series(rows, dtype=pl.Int64), partial(_json, table), new)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names; one that was there before also gets its place."""
    seen: list[str] = []
    for name in names:
        seen.append(name if name not in seen else f"{name} ({len(seen) + 1})")
    return seen


# JSONL


def _jsonl(file: str, source: Source, names: Sequence[str]) -> Iterator[Chunk]:
    theirs = _theirs(source, names)
    done = 0
    with _text(file, source) as stream:
        for block in _blocks(stream, BLOCK):
            lines = _lines(block)
            rows = pl.int_range(done + 1, done + len(lines) + 1, dtype=pl.Int64, eager=True)
            done += len(lines)
            shaped = lines.str.starts_with("{") & lines.str.ends_with("}")
            bad = [
                (row, line, NO_OBJECT) for row, line in zip(rows.filter(~shaped), lines.filter(~shaped), strict=True)
            ]
            lines, rows = lines.filter(shaped), rows.filter(shaped)
            given = _uniform(lines, theirs)
            if given is None:
                given, reasons = _mixed(lines, theirs)
                good = reasons.is_null()
                bad += zip(rows.filter(~good), lines.filter(~good), reasons.filter(~good), strict=True)
                lines, rows = lines.filter(good), rows.filter(good)
            yield Chunk(_frame(source, names, given, len(rows)), rows, partial(_gather, lines), sorted(bad))


def _blocks(stream: pa.NativeFile, size: int) -> Iterator[bytes]:
    """Whole lines, about so many bytes of them together."""
    rest = b""
    while data := stream.read(size):
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut]
        rest = data[cut:] if cut else rest + data
    if rest:
        yield rest


def _lines(block: bytes) -> pl.Series:
    """The lines that are not blank, without the blanks around them."""
    text = block.decode("utf-8").replace("\r", "\n")  # no JSON text holds either
    lines = pl.Series([text], dtype=pl.String).str.split("\n").explode().str.strip_chars(" \t\ufeff")
    return lines.filter(lines != "")


def _gather(lines: pl.Series, positions: Sequence[int]) -> list[str]:
    return lines.gather(list(positions)).to_list()


def _uniform(lines: pl.Series, theirs: Mapping[str, str]) -> dict[str, pl.Series] | None:
    """The file's key -> its values as text, where every {...} line is an object and each key has values of one kind.

    None where that is not so, or not sure without a look at each line.
    """
    sample = [_parse(line, json.loads) for line in lines.head(LOOKED_AT)]
    kinds = {key: _kind([row.get(key) for row in sample if row]) for key in theirs.values()}
    if None in sample or None in kinds.values() or any(kinds[theirs[ours]] == LIST for ours in theirs if ours in IDS):
        return None
    content = (lines.str.join("\n").item() or "").encode()
    for integer in (pa.int64(), pa.float64()):
        schema = [(key, integer if kind == pa.int64() else kind) for key, kind in kinds.items()]
        try:
            table = pa.json.read_json(
                pa.BufferReader(content),
                pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
                pa.json.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="ignore"),
            )
        except pa.ArrowInvalid:
            continue
        if len(table) != len(lines):  # two objects in a line; none can take two, as each begins with { and ends with }
            return None
        given = {key: _as_written(lines, key, _read(table[key])) for key in kinds}
        sure = {key: values for key, values in given.items() if values is not None}
        return sure if len(sure) == len(given) else None
    return None


def _kind(values: Iterable[Any]) -> pa.DataType | None:
    """string, int64, float64 where any is a float, LIST of text, or None for anything else."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {list}:
        return LIST if {type(part) for value in values for part in value or ()} <= {str, type(None)} else None
    if kinds <= {int, float} and kinds:
        return pa.float64() if float in kinds else pa.int64()
    return pa.string() if kinds <= {str} else None


def _as_written(lines: pl.Series, key: str, values: pl.Series) -> pl.Series | None:
    """Values as text, floats as the lines write them; None if that cannot be told."""
    if values.dtype != pl.Float64:
        return values.cast(pl.String) if values.dtype == pl.Int64 else values
    quoted = json.dumps(key, ensure_ascii=False)
    text = lines.str.extract(pl.escape_regex(quoted) + r"\s*:\s*(-?[0-9][0-9.eE+-]*)").set(values.is_null(), None)
    once = lines.str.count_matches(quoted, literal=True) == 1
    same = once & (text.cast(pl.Float64, strict=False) == values)
    return text if (same | values.is_null()).all() else None


def _mixed(lines: pl.Series, theirs: Mapping[str, str]) -> tuple[dict[str, pl.Series], pl.Series]:
    """The same from any lines, one by one, of the good ones; and of every line the reason to refuse it, or null."""
    rows = [_parse(line) for line in lines]
    ids = [(ours, theirs[ours]) for ours in IDS if ours in theirs]
    reasons = [_refused(row, ids) for row in rows]
    good = [row for row, reason in zip(rows, reasons, strict=True) if row is not None and reason is None]
    given = {key: _column([row.get(key) for row in good]) for key in theirs.values()}
    return given, pl.Series(reasons, dtype=pl.String)


def _parse(line: str, parse: Callable[[str], Any] = AS_WRITTEN.decode) -> dict[str, Any] | None:
    """The object in a line, or None."""
    try:
        row = parse(line)
        if "\\u" in line:  # half a surrogate pair is valid JSON but no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _refused(row: dict[str, Any] | None, ids: Sequence[tuple[str, str]]) -> str | None:
    """Why a row cannot be taken: its id or timestamp is a list, an object or a truth value."""
    if row is None:
        return NO_OBJECT
    for ours, theirs in ids:
        if isinstance(row.get(theirs), (list, dict, bool)):
            return f"{ours} is not text or a number"
    return None


def _column(values: list[Any]) -> pl.Series:
    """JSON values of one key as text, or as lists of text where any of them is a list."""
    if any(isinstance(value, list) for value in values):
        lists = [None if v is None else [_scalar(part) for part in (v if isinstance(v, list) else [v])] for v in values]
        return pl.Series(lists, dtype=pl.List(pl.String))
    return pl.Series([_scalar(value) for value in values], dtype=pl.String)


def _scalar(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if type(value) is int else json.dumps(value, ensure_ascii=False)


# Parquet


def _seekable(file: str) -> pa.NativeFile:
    system, path, _ = place(file)
    return system.open_input_file(path)


def _shares(file: str, source: Source) -> list[tuple[int, int]] | list[None]:
    """The row groups of each piece of a file; None for a whole file."""
    if form_of(file, source)[0] != "parquet":
        return [None]
    metadata = _guarded(file, source, lambda: pq.ParquetFile(_seekable(file)).metadata)
    runs = _runs(_group_rows(metadata), range(metadata.num_row_groups), PIECE)
    return [(run.start, run.stop) for run in runs] if len(runs) > 1 else [None]


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


def _parquet(file: str, source: Source, names: Sequence[str], groups: tuple[int, int] | None) -> Iterator[Chunk]:
    content = pq.ParquetFile(_seekable(file))
    group_rows = _group_rows(content.metadata)
    start, stop = groups or (0, len(group_rows))
    columns = sorted(set(_theirs(source, names).values()))
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
            given = {theirs: _read(table[theirs]) for theirs in columns}
            rows = pl.int_range(done + span[0] + 1, done + span[1] + 1, dtype=pl.Int64, eager=True)

            def whole(
                positions: Sequence[int], table: pa.Table = table, rest: _Run = rest, span: tuple[int, int] = span
            ) -> list[str]:
                def read() -> pa.Table:  # only the columns that were not read already
                    every = rest.rows(*span) if others != [] else pa.table({})
                    if others is None:
                        return every
                    return pa.table({name: (table if name in columns else every)[name] for name in names_there})

                return _guarded(file, source, lambda: _json(read(), positions))

            yield Chunk(_frame(source, names, given, len(rows)), rows, whole)
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


# values


def _read(column: pa.ChunkedArray) -> pl.Series:
    """A column of the file as the pipeline reads it: text, numbers, dates, times, or lists of text or numbers."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type))
        kind = column.type
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        column = column.cast(pa.timestamp(kind.unit, "UTC"))  # the same instants; not every zone is known everywhere
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    plain = _plain(kind.value_type if lists else kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    return pl.Series(pl.from_arrow(column if plain else _as_text(column)))


def _json(table: pa.Table, positions: Sequence[int]) -> list[str]:
    """These rows as JSON: integers exact, what JSON lacks as text, a float that is no number as null."""
    rows = table.rename_columns(_distinct(table.column_names)).take(pa.array(positions, pa.int64()))
    columns = {name: rows[name] if _whole(rows[name].type) else _as_text(rows[name]) for name in rows.column_names}
    frame = pl.DataFrame({name: pl.Series(pl.from_arrow(column)) for name, column in columns.items()})
    return frame.select(pl.struct(pl.all()).struct.json_encode()).to_series().to_list()


def _plain(kind: pa.DataType) -> bool:
    is_ = pa.types
    text = is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind)
    number = is_.is_integer(kind) or is_.is_float32(kind) or is_.is_float64(kind)
    return text or number or is_.is_boolean(kind) or is_.is_null(kind)


def _whole(kind: pa.DataType) -> bool:
    """Whether polars writes it as JSON exactly, nested as it is."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _whole(kind.value_type)
    return all(_whole(part.type) for part in kind) if pa.types.is_struct(kind) else _plain(kind)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Any values as text, lists as lists of text."""
    kind = column.type
    many = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    try:
        return column.cast(LIST if many else pa.string())
    except pa.ArrowException:
        cells = [cell if cell.is_valid else None for cell in column]
        if many:
            return pa.array([None if cell is None else [_cell(part) for part in cell] for cell in cells], LIST)
        return pa.array([None if cell is None else _cell(cell) for cell in cells], pa.string())


def _cell(cell: pa.Scalar) -> str | None:
    """Text of anything: objects as JSON, bytes that are no UTF-8 in base64."""
    try:
        value = cell.as_py()
    except (pa.ArrowException, ValueError, OverflowError, KeyError):  # a date or a zone that Python lacks
        return f"<{cell.type}>"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=_odd)
    return None if value is None else _odd(value)


def _odd(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
