"""Columns of the raw input and their validation: rows as text in, typed rows and the reasons of the others out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from mvrec_core.config import CategoryView, Config, EventSource, NumberView, Source, TextView, View

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
FILE, ROW, RAW, REASON = "file", "row", "raw", "reason"
LIST = pl.List(pl.String)
YEARS = -62_135_596_800_000_000, 253_402_300_799_999_999  # microseconds of years 1 to 9999: what a calendar can show


@dataclass(frozen=True)
class Columns:
    """What one source needs: our column names, the file's names, and the views that read them."""

    needed: Mapping[str, str]  # our name -> the file's
    views: Mapping[str, View]

    @staticmethod
    def of(config: Config, source: str) -> Columns:
        """source: "events", "items" or "users"."""
        keys = {"events": ("user_id", "item_id", "timestamp"), "items": ("item_id",), "users": ("user_id",)}[source]
        views = config.views_at({"events": "event", "items": "item", "users": "user"}[source])  # type: ignore[arg-type]
        names = list(keys)
        for view in views.values():
            if isinstance(view, TextView):
                names += view.columns
            elif isinstance(view, (CategoryView, NumberView)):
                names.append(view.column)
        given: Source = getattr(config.data, source)
        return Columns({name: given.columns.get(name, name) for name in names}, views)


def read_ids(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Ids as text, without the blanks around them; a missing or blank one is null."""
    return frame.with_columns(_text(frame, name).replace("", None).alias(name) for name in names)


def invalid_ids(names: Sequence[str]) -> pl.Expr:
    """The reason why a row cannot be taken, or null: text."""
    reason = pl.lit(None, pl.String)
    for name in reversed(names):
        reason = pl.when(pl.col(name).is_null()).then(pl.lit(f"{name} is missing")).otherwise(reason)
    return reason


def read_timestamps(frame: pl.DataFrame, source: EventSource) -> tuple[pl.DataFrame, str]:
    """timestamp as int64 microseconds since 1970 UTC, null where it is none or outside years 1 to 9999 (a wrong unit
    does that); and the reason that such a row gets."""
    read, reason = _microseconds(frame, source)
    inside = read["timestamp"].is_between(*YEARS).fill_null(False)
    return read.with_columns(read["timestamp"].set(~inside, None)), f"{reason} in years 1 to 9999"


def _microseconds(frame: pl.DataFrame, source: EventSource) -> tuple[pl.DataFrame, str]:
    unit = source.timestamp_unit
    column = frame["timestamp"]
    if unit == "iso":
        if column.dtype.is_temporal():
            moment = column.cast(pl.Datetime("us"))
        else:
            text = frame.select(_text(frame, "timestamp").alias("t"))["t"]
            moment = text.str.to_datetime(time_unit="us", time_zone="UTC", strict=False, ambiguous="null")
        return frame.with_columns(moment.dt.epoch("us").alias("timestamp")), "timestamp is not an ISO-8601 instant"
    reason = f"timestamp is not a number ({unit} since 1970)"
    if column.dtype.is_temporal():
        return frame.with_columns(column.cast(pl.Datetime("us")).dt.epoch("us").alias("timestamp")), reason
    if column.dtype.is_integer():
        whole, fraction = column.cast(pl.Int64, strict=False), pl.Series([0.0], dtype=pl.Float64)
    else:
        text = frame.select(_text(frame, "timestamp").alias("t"))["t"]
        parts = text.str.extract_groups(r"^([+-]?\d+)(\.\d*)?$").struct.unnest()
        whole = parts["1"].cast(pl.Int64, strict=False)
        fraction = (
            ("0" + parts["2"].fill_null("")).str.replace(r"\.$", "").cast(pl.Float64, strict=False).fill_null(0.0)
        )
    if unit == "ns":
        return frame.with_columns((whole // 1000).alias("timestamp")), reason
    scale = MICROSECONDS[unit]
    fits = whole.abs() <= (2**63 - 1) // scale - 1
    micro = whole.set(~fits.fill_null(False), None) * scale + (fraction * scale).round().cast(pl.Int64)
    return frame.with_columns(micro.alias("timestamp")), reason


def read_value(frame: pl.DataFrame, view: View) -> pl.Series:
    """What a view reads, as prepared data holds it: text -> String, category -> List(String), number -> Float64,
    time -> Int64; null where it is missing or, for a number, unreadable."""
    if isinstance(view, TextView):
        return frame.select(_joined(frame, view.columns).alias("value"))["value"]
    if isinstance(view, CategoryView):
        return frame.select(_values(frame, view).alias("value"))["value"]
    if isinstance(view, NumberView):
        number = frame[view.column].cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
        return number.set(~number.is_finite().fill_null(False), None)
    return frame["timestamp"]


def unreadable(frame: pl.DataFrame, view: NumberView) -> int:
    """Cells of a number view that hold something else than a number."""
    text = frame[view.column].cast(pl.String).str.strip_chars()
    return int(((text != "") & text.is_not_null() & read_value(frame, view).is_null()).sum())


def shown(frame: pl.DataFrame, name: str) -> pl.Series:
    """A column as people see it: text, null where blank."""
    return frame.select(_cell(frame, name).replace("", None).alias("value"))["value"]


def _text(frame: pl.DataFrame, name: str) -> pl.Expr:
    dtype = frame.schema[name]
    if dtype in (pl.Float32, pl.Float64):  # 196.0 is the id 196; integers never pass through a float here
        column = pl.col(name)
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2**53)
        return (
            pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(column.cast(pl.String))
        )
    return pl.col(name).cast(pl.String).str.strip_chars()


def _cell(frame: pl.DataFrame, name: str) -> pl.Expr:
    if isinstance(frame.schema[name], pl.List):
        return pl.col(name).cast(LIST).list.join(", ", ignore_nulls=True)
    return _text(frame, name)


def _joined(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Expr:
    """ "title: Toy Story genres: Animation Comedy", blank columns left out; null where all are."""
    parts = []
    for name in columns:
        cell = _cell(frame, name)
        parts.append(pl.when(cell != "").then(pl.lit(f"{name}: ") + cell))
    joined = pl.concat_str(parts, separator=" ", ignore_nulls=True)
    return pl.when(joined != "").then(joined)


def _values(frame: pl.DataFrame, view: CategoryView) -> pl.Expr:
    if isinstance(frame.schema[view.column], pl.List):
        values = pl.col(view.column).cast(LIST)
    elif view.separator:
        values = _text(frame, view.column).str.split(view.separator)
    else:
        values = _text(frame, view.column).reshape((-1, 1)).arr.to_list()
    clean = values.list.eval(pl.element().str.strip_chars().replace("", None).drop_nulls())
    return pl.when(clean.list.len() > 0).then(clean)
