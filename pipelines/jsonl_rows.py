"""The rows of JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.json

from mvrec_core.data import Source
from pipelines import decoded
from pipelines.cells import LIST, read
from pipelines.chunk import IDS, Chunk, frame_of, theirs_of
from pipelines.decoded import open_text

HEAD = 1 << 20  # bytes of text that show the columns
LOOKED_AT = 1000  # lines that show which keys there are and what they hold
NO_OBJECT = "not a JSON object"
AS_WRITTEN = json.JSONDecoder(parse_float=str, parse_constant=str)


def chunks(file: str, source: Source, names: Sequence[str]) -> Iterator[Chunk]:
    theirs = theirs_of(source, names)
    done = 0
    with open_text(file, source) as stream:
        for block in _blocks(stream, decoded.BLOCK):
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
            yield Chunk(frame_of(source, names, given, len(rows)), rows, partial(_gather, lines), sorted(bad))


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
        given = {key: _as_written(lines, key, read(table[key])) for key in kinds}
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


def keys(file: str, source: Source) -> list[str]:
    """Of the first lines' objects, in the order in which they come."""
    with open_text(file, source) as stream:
        lines = _lines(next(_blocks(stream, HEAD), b""))
    return list(dict.fromkeys(key for line in lines.head(LOOKED_AT) for key in _parse(line) or ()))
