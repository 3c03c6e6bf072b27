"""The values of a raw file: as the pipeline reads them, and as JSON, which loses nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

LIST = pa.list_(pa.string())


def read(column: pa.ChunkedArray) -> pl.Series:
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


def as_json(table: pa.Table, positions: Sequence[int]) -> list[str]:
    """These rows as JSON: integers exact, what JSON lacks as text, a float that is no number as null."""
    rows = table.rename_columns(distinct(table.column_names)).take(pa.array(positions, pa.int64()))
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


def distinct(names: Iterable[str]) -> list[str]:
    """The names; one that was there before also gets its place."""
    seen: list[str] = []
    for name in names:
        seen.append(name if name not in seen else f"{name} ({len(seen) + 1})")
    return seen
