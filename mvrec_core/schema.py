"""Columns and types of events, items and users, and the one place where raw columns are checked.

Raw columns arrive as Arrow arrays: text (CSV, JSON) or whatever type a Parquet file holds. They leave typed, with a reason
for every row that is not taken. Everything is vectorised: no Python call a row.

    check_events    user_id, item_id, timestamp and the event-level views
    check_entities  item_id or user_id and the views that belong to it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mvrec_core.config import CategoryView, NumberView, TextView, View
from mvrec_core.errors import DataError

USER, ITEM, TIMESTAMP = "user_id", "item_id", "timestamp"
DISPLAY = "display"  # what people see of an item: the first column of its text
SPLITS = ("train", "valid", "test")  # a split is stored as its position here
TRAIN, VALID, TEST = range(3)

VALUE_TYPES: dict[str, pa.DataType] = {
    "category": pa.list_(pa.string()),  # null: missing
    "number": pa.float64(),  # null: missing
    "text": pa.string(),  # null: missing
    "time": pa.int64(),  # microseconds since 1970, UTC
}
SPINE = pa.schema(
    {
        USER: pa.string(),
        "item": pa.list_(pa.string()),
        TIMESTAMP: pa.list_(pa.int64()),  # microseconds since 1970, UTC
        "split": pa.list_(pa.int8()),
    }
)
REJECTED = pa.schema(
    {"source": pa.string(), "file": pa.string(), "row": pa.int64(), "raw": pa.string(), "reason": pa.string()}
)

DUPLICATE = "{} is a duplicate of an earlier row"

_INTEGER = r"^-?[0-8]?[0-9]{1,18}$"  # all of these fit int64
_DECIMAL = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_INSTANT = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?$"
)
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999  # years 1 to 9999, what a calendar can show
_SCALE = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True)
class Checked:
    """The outcome of a check of n raw rows; `taken` and `rejected` together are 0..n-1, each once."""

    rows: pa.Table  # the rows taken, typed
    taken: np.ndarray  # int64, positions of `rows` in the input
    rejected: np.ndarray  # int64, positions of the others
    reasons: pa.Array  # string, aligned with `rejected`


def value_column(view: str) -> str:
    """The column of a view in a table that also holds ids: a view may be called 'timestamp' or 'display'."""
    return f"view:{view}"


def view_columns(view: View) -> tuple[str, ...]:
    """The raw columns, by our names, that a view reads besides ids and the timestamp."""
    if isinstance(view, TextView):
        return view.columns
    return (view.column,) if isinstance(view, (CategoryView, NumberView)) else ()


def event_schema(views: Mapping[str, View]) -> pa.Schema:
    """Checked events, an event a row; time views are left out, they are the timestamp."""
    fields = {USER: pa.string(), ITEM: pa.string(), TIMESTAMP: pa.int64()}
    return pa.schema(fields | _value_fields(views))


def entity_schema(key: str, views: Mapping[str, View]) -> pa.Schema:
    """Checked items (key item_id, with what people see of them) or users (key user_id)."""
    shown = {DISPLAY: pa.string()} if key == ITEM else {}
    return pa.schema({key: pa.string()} | shown | _value_fields(views))


def check_events(raw: Mapping[str, pa.Array], unit: str, views: Mapping[str, View]) -> Checked:
    """Raw columns by our names -> checked events. `unit` of the timestamp: s, ms, us, ns or iso.

    A number view holds NaN where a value was there but could not be read. Raises DataError where a column's type cannot be used.
    """
    users, no_user = read_ids(raw[USER], USER)
    items, no_item = read_ids(raw[ITEM], ITEM)
    times, no_time = read_timestamps(raw[TIMESTAMP], unit)
    columns = {USER: users, ITEM: items, TIMESTAMP: times} | _values(raw, views)
    return _divide(columns, event_schema(views), pc.coalesce(no_user, no_item, no_time))


def check_entities(raw: Mapping[str, pa.Array], key: str, views: Mapping[str, View]) -> Checked:
    """Raw columns by our names -> checked items or users. Duplicates are not looked for: see `repeats`.

    Raises DataError where a column's type cannot be used.
    """
    ids, reasons = read_ids(raw[key], key)
    columns = {key: ids} | _values(raw, views)
    if key == ITEM:
        texts = [view.columns[0] for view in views.values() if isinstance(view, TextView)]
        columns[DISPLAY] = _clean(raw[texts[0]], texts[0]) if texts else pa.nulls(len(ids), pa.string())
    return _divide(columns, entity_schema(key, views), reasons)


def repeats(ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """bool [n]: this id was there in an earlier row."""
    codes = np.asarray(_flat(ids).dictionary_encode().indices)
    again = np.ones(len(codes), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    return again


def read_ids(column: pa.Array, name: str) -> tuple[pa.Array, pa.Array]:
    """Ids as text, exactly as written, and reasons (null: none). Integers never pass through floating point.

    A column of floats, which is what pandas makes of integers with gaps, is taken back to integers where that is exact.
    """
    texts = _texts(column, name, only_ids=True)
    reasons = _reasons(_is_blank(texts), f"{name} is missing")
    if pa.types.is_floating(column.type):
        lost = pc.and_(pc.is_null(texts), pc.fill_null(pc.is_finite(column), False))
        reasons = pc.if_else(lost, f"{name} is not a whole number", reasons)
    return texts, reasons


def read_timestamps(column: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    """int64 microseconds since 1970 in UTC, and reasons (null: none). Instants without a zone are read as UTC."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return read_timestamps(column.cast(kind.value_type), unit)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        numbers = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return _in_calendar(np.asarray(pc.fill_null(numbers, 0)).astype(float), numbers, column.is_null(), None, unit)
    if pa.types.is_floating(kind) and unit != "iso":
        missing = pc.is_null(column, nan_is_null=True)
        return _from_numbers(pa.nulls(len(column), pa.int64()), column.cast(pa.float64()), missing, unit)
    texts = pc.utf8_trim_whitespace(_texts(column, TIMESTAMP))
    blank = _is_blank(texts)
    if unit == "iso":
        return _from_instants(texts, blank)
    whole = _matching(texts, _INTEGER).cast(pa.int64())
    return _from_numbers(whole, _matching(texts, _DECIMAL).cast(pa.float64()), blank, unit)


def read_instant(text: str) -> int:
    """One ISO-8601 instant in microseconds since 1970. Raises DataError quoting what was found."""
    times, reasons = read_timestamps(pa.array([text], pa.string()), "iso")
    if reasons[0].is_valid:
        raise DataError(f"expected an ISO-8601 date such as 2024-01-31T12:00:00Z, found '{text}'")
    return times[0].as_py()


def read_numbers(column: pa.Array, name: str) -> pa.Array:
    """float64; null: missing, NaN: something is there that is no finite number. A list of one number is that number."""
    if _is_list(column.type):
        single = pc.fill_null(pc.equal(pc.list_value_length(column), 1), False)
        filled = pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
        at, column = np.flatnonzero(single), _texts(pc.list_flatten(column.filter(single)), name)
        inner = pa.array(np.searchsorted(at, np.arange(len(single))), mask=~np.asarray(single))
        values = read_numbers(column, name).take(inner)
        return pc.if_else(pc.or_(single, pc.invert(filled)), values, np.nan)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64())
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)  # in Parquet NaN is how pandas says missing
        return pc.if_else(pc.is_inf(numbers), np.nan, numbers)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.float64(), safe=False)
    texts = pc.utf8_trim_whitespace(_texts(column, name))
    numbers = _matching(texts, _DECIMAL).cast(pa.float64())
    unreadable = pc.or_(pc.is_null(numbers), pc.fill_null(pc.is_inf(numbers), False))
    return pc.if_else(_is_blank(texts), None, pc.if_else(unreadable, np.nan, numbers))


def read_categories(column: pa.Array, name: str, separator: str | None) -> pa.Array:
    """list<string>; null where no value is there. Values are trimmed, blank ones dropped."""
    if _is_list(column.type):
        values, rows = pc.list_flatten(column), np.asarray(pc.list_parent_indices(column))
    else:
        values, rows = column, np.arange(len(column))
    values = _texts(values, name)
    if separator:
        parts = pc.split_pattern(values, separator)
        values, rows = pc.list_flatten(parts), rows[np.asarray(pc.list_parent_indices(parts))]
    values = pc.utf8_trim_whitespace(values)
    keep = ~np.asarray(_is_blank(values))
    counts = np.bincount(rows[keep], minlength=len(column))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values.filter(pa.array(keep)), mask=pa.array(counts == 0))


def read_text(columns: Mapping[str, pa.Array]) -> pa.Array:
    """ "name: value name: value" of every row; null where all columns are missing. Lists are joined with ", "."""
    parts = [
        pc.binary_join_element_wise(pa.scalar(f"{name}:"), _clean(column, name), " ")
        for name, column in columns.items()
    ]
    joined = pc.binary_join_element_wise(*parts, " ", null_handling="skip")
    return pc.if_else(pc.equal(joined, ""), None, joined)


def _value_fields(views: Mapping[str, View]) -> dict[str, pa.DataType]:
    return {value_column(name): VALUE_TYPES[view.kind] for name, view in views.items() if view_columns(view)}


def _values(raw: Mapping[str, pa.Array], views: Mapping[str, View]) -> dict[str, pa.Array]:
    """The values of each view that reads columns."""
    values = {}
    for name, view in views.items():
        if isinstance(view, NumberView):
            values[value_column(name)] = read_numbers(raw[view.column], view.column)
        elif isinstance(view, CategoryView):
            values[value_column(name)] = read_categories(raw[view.column], view.column, view.separator)
        elif isinstance(view, TextView):
            values[value_column(name)] = read_text({column: raw[column] for column in view.columns})
    return values


def _divide(columns: Mapping[str, pa.Array], schema: pa.Schema, reasons: pa.Array) -> Checked:
    good = np.asarray(reasons.is_null())
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    taken, rejected = np.flatnonzero(good), np.flatnonzero(~good)
    return Checked(table.take(pa.array(taken)), taken, rejected, reasons.take(pa.array(rejected)))


def _from_numbers(whole: pa.Array, decimal: pa.Array, blank: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    """Counts of `unit`: int64 where they are whole, else float64 -> microseconds."""
    decimal = pc.if_else(pc.is_finite(decimal), decimal, None)
    is_whole, counts = np.asarray(whole.is_valid()), np.asarray(pc.fill_null(whole, 0))
    size = np.where(is_whole, counts.astype(float), np.asarray(pc.fill_null(decimal, 0.0)))
    size = size / 1000 if unit == "ns" else size * _SCALE[unit]
    fits = (size >= _FIRST_US) & (size <= _LAST_US)
    counts = np.where(fits, counts, 0)  # so that scaling cannot overflow
    exact = counts // 1000 if unit == "ns" else counts * _SCALE[unit]
    rounded = np.round(np.where(fits, size, 0)).astype(np.int64)
    numbers = pa.array(np.where(is_whole, exact, rounded))
    return _in_calendar(size, numbers, blank, pc.or_(whole.is_valid(), decimal.is_valid()), unit)


def _from_instants(texts: pa.Array, blank: pa.Array) -> tuple[pa.Array, pa.Array]:
    """ISO-8601 text -> microseconds; impossible dates such as 30 February are not read."""
    shaped = _matching(texts, _INSTANT)
    parsed = pd.to_datetime(shaped.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    instants = parsed.to_numpy(dtype="datetime64[us]")
    unread = np.isnat(instants)
    numbers = np.where(unread, 0, instants.astype(np.int64))
    return _in_calendar(numbers.astype(float), pa.array(numbers), blank, pa.array(~unread), "iso")


def _in_calendar(
    size: np.ndarray, numbers: pa.Array, blank: pa.Array, readable: pa.Array | None, unit: str
) -> tuple[pa.Array, pa.Array]:
    """The last step of reading timestamps: reasons, the gravest last so that it wins."""
    reasons = _reasons(pa.array((size < _FIRST_US) | (size > _LAST_US)), f"{TIMESTAMP} is outside years 1 to 9999")
    if readable is not None:
        unread = f"{TIMESTAMP} is not {'an ISO-8601 date' if unit == 'iso' else 'a number'}"
        reasons = pc.if_else(readable, reasons, unread)
    reasons = pc.if_else(blank, f"{TIMESTAMP} is missing", reasons)
    return numbers, reasons


def _texts(column: pa.Array, name: str, only_ids: bool = False) -> pa.Array:
    """Any scalar column as text; null stays null. Floats that are whole numbers lose their '.0'."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _texts(column.cast(kind.value_type), name, only_ids)
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        return _float_texts(column.cast(pa.float64()), only_ids)
    if not only_ids and (pa.types.is_boolean(kind) or pa.types.is_temporal(kind) or pa.types.is_decimal(kind)):
        return column.cast(pa.string())
    raise DataError(f"column '{name}': expected text or {'whole ' * only_ids}numbers, found {kind}")


def _float_texts(column: pa.Array, only_whole: bool) -> pa.Array:
    numbers = np.asarray(pc.fill_null(column, np.nan))
    whole = np.isfinite(numbers) & (np.abs(numbers) < 2.0**53) & (numbers == np.floor(numbers))
    as_integer = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    other = pa.nulls(len(column), pa.string())
    if not only_whole:
        other = pc.if_else(pa.array(np.isfinite(numbers)), column.cast(pa.string()), other)
    return pc.if_else(pa.array(whole), as_integer, other)


def _clean(column: pa.Array, name: str) -> pa.Array:
    """Text for people: trimmed, lists joined, null where blank."""
    if _is_list(column.type):
        return pc.binary_join(read_categories(column, name, None), ", ")
    texts = pc.utf8_trim_whitespace(_texts(column, name))
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _matching(texts: pa.Array, pattern: str) -> pa.Array:
    return pc.if_else(pc.match_substring_regex(texts, pattern), texts, None)


def _is_blank(texts: pa.Array) -> pa.Array:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)


def _reasons(wrong: pa.Array, reason: str) -> pa.Array:
    return pc.if_else(wrong, reason, pa.scalar(None, pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
