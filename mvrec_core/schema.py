"""Columns of the raw input and their validation: rows as text in, typed rows and the reasons of the others out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from mvrec_core.config import Config
from mvrec_core.data import Clean, TimeUnit
from mvrec_core.errors import ConfigError
from mvrec_core.views import CategoryView, NumberView, TextView, VectorView, View

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
LIST = pl.List(pl.String)
YEARS = -62_135_596_800_000_000, 253_402_300_799_999_999  # microseconds of years 1 to 9999: what a calendar can show


@dataclass(frozen=True)
class Columns:
    """What one source has to give: columns under our names, and the views that read them."""

    names: tuple[str, ...]
    views: Mapping[str, View]

    @staticmethod
    def of(config: Config, source: str) -> Columns:
        """source: "events", "items" or "users"."""
        keys = {"events": ("user_id", "item_id", "timestamp"), "items": ("item_id",), "users": ("user_id",)}[source]
        views = config.views_at({"events": "event", "items": "item", "users": "user"}[source])  # type: ignore[arg-type]
        names = list(keys)
        if source == "events":
            names += [*config.data.clean.keep, *config.data.clean.ranges]
        elif "timestamp" in getattr(config.data, source).columns:
            names.append("timestamp")
        for view in views.values():
            if isinstance(view, TextView):
                names += view.columns
            elif isinstance(view, (CategoryView, NumberView)) or (isinstance(view, VectorView) and view.path is None):
                names.append(view.column)
        return Columns(tuple(dict.fromkeys(names)), views)


def instant(text: str, key: str) -> int:
    """Microseconds since 1970 UTC of an ISO-8601 instant, UTC where it names no zone. Raises ConfigError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{key}: expected an ISO-8601 instant, found '{text}'") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp()) * 1_000_000 + moment.microsecond


def read_ids(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Ids as text, without the blanks around them; a missing or blank one is null."""
    return frame.with_columns(_text(frame, name).replace("", None).alias(name) for name in names)


def invalid_ids(names: Sequence[str]) -> pl.Expr:
    """The reason why a row cannot be taken, or null: text."""
    reason = pl.lit(None, pl.String)
    for name in reversed(names):
        reason = pl.when(pl.col(name).is_null()).then(pl.lit(f"{name} is missing")).otherwise(reason)
    return reason


def left_out(frame: pl.DataFrame, clean: Clean) -> pl.Expr:
    """The reason why a valid row is not wanted, or null: text. Its timestamp is in microseconds."""
    reason = pl.lit(None, pl.String)
    time = pl.col("timestamp")
    if clean.until is not None:
        late = time >= instant(clean.until, "data.clean.until")
        reason = pl.when(late).then(pl.lit(f"at or after {clean.until}")).otherwise(reason)
    if clean.since is not None:
        early = time < instant(clean.since, "data.clean.since")
        reason = pl.when(early).then(pl.lit(f"before {clean.since}")).otherwise(reason)
    for name, bounds in reversed(clean.ranges.items()):
        number = pl.col(name).cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
        inside = number.is_between(
            -float("inf") if bounds.min is None else bounds.min, float("inf") if bounds.max is None else bounds.max
        )
        what = " to ".join("any" if bound is None else f"{bound:g}" for bound in (bounds.min, bounds.max))
        reason = pl.when(inside.fill_null(False)).then(reason).otherwise(pl.lit(f"{name} is not in {what}"))
    for name, values in reversed(clean.keep.items()):
        wanted = _text(frame, name).is_in(list(values)).fill_null(False)
        reason = pl.when(wanted).then(reason).otherwise(pl.lit(f"{name} is not one of {', '.join(values)}"))
    return reason


def read_timestamps(frame: pl.DataFrame, unit: TimeUnit) -> tuple[pl.DataFrame, str]:
    """timestamp as int64 microseconds since 1970 UTC, null where it is none or outside years 1 to 9999 (a wrong unit
    does that); and the reason that such a row gets."""
    read, reason = _microseconds(frame, unit)
    inside = read["timestamp"].is_between(*YEARS).fill_null(False)
    return read.with_columns(read["timestamp"].set(~inside, None)), f"{reason} in years 1 to 9999"


def _microseconds(frame: pl.DataFrame, unit: TimeUnit) -> tuple[pl.DataFrame, str]:
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
        return _joined(frame, view)
    if isinstance(view, CategoryView):
        return frame.select(_values(frame, view).alias("value"))["value"]
    if isinstance(view, NumberView):
        column = frame[view.column]
        text = None if column.dtype.is_numeric() else _number_text(frame, view)
        number = (column if text is None else text).cast(pl.Float64, strict=False)
        return number.set(~number.is_finite().fill_null(False), None)
    return frame["timestamp"]


def read_vectors(cells: pl.Series, view: VectorView, size: int | None) -> tuple[pl.Series, str | None, int]:
    """Lists of numbers, or text that holds them, as List(Float32), null where there are none; and, about the first that
    is not `size` finite numbers (None: as many as the first has), what was expected and found, and its place."""
    parts = cells
    if not isinstance(cells.dtype, pl.List):
        text = cells.cast(pl.String).str.strip_chars()
        parts = text.str.extract_all(r"\S+") if view.separator is None else text.str.split(view.separator)
        parts = parts.set((text == "").fill_null(False), None)
    parts = parts.set((parts.list.len() == 0).fill_null(False), None)
    text_parts = isinstance(parts.dtype, pl.List) and parts.dtype.inner == pl.String
    number = (pl.element().str.strip_chars() if text_parts else pl.element()).cast(pl.Float32, strict=False)
    vectors = parts.list.eval(pl.when(number.is_finite()).then(number))
    length, numbers = vectors.list.len(), vectors.list.drop_nulls().list.len()
    size = size if size is not None or length.drop_nulls().is_empty() else int(length.drop_nulls()[0])
    bad = ((length != size) | (length != numbers)).fill_null(False).arg_true()
    if bad.is_empty():
        return vectors, None, 0
    place = int(bad[0])
    if length[place] != size:
        return vectors, f"expected {size} numbers, found {length[place]}", place
    found = parts[place][int(vectors[place].is_null().arg_true()[0])]
    return vectors, f"expected {size} finite numbers, found {found!r:.60}", place


def unreadable(frame: pl.DataFrame, view: NumberView) -> int:
    """Cells of a number view that hold something else than a number."""
    if frame[view.column].dtype.is_integer():
        return 0
    if frame[view.column].dtype.is_float():
        return int(frame[view.column].is_finite().not_().sum())
    text = _number_text(frame, view)
    return int(((text != "") & text.is_not_null() & read_value(frame, view).is_null()).sum())


def _number_text(frame: pl.DataFrame, view: NumberView) -> pl.Series:
    column = frame[view.column]
    if isinstance(column.dtype, pl.List):  # no number, whatever is in it
        return pl.select(pl.when(column.is_not_null()).then(pl.lit("list"))).to_series()
    return column.cast(pl.String).str.strip_chars()


def shown(frame: pl.DataFrame, name: str, clean: Sequence[str] = ()) -> pl.Series:
    """A column as people see it: text, null where blank."""
    return tidy(frame.select(_cell(frame, name).alias("value"))["value"], clean)


def tidy(texts: pl.Series, steps: Sequence[str]) -> pl.Series:
    """Text without blanks around it, null where none is left, after some of the steps, in this order: "html" replaces
    entities (&amp;) by what they stand for, "nfc" brings Unicode to its composed form, "control" makes runs of control
    characters a blank."""
    if "html" in steps:
        escaped = texts.str.contains(r"&(#|\w)").fill_null(False).arg_true()
        if len(escaped):
            plain = [html.unescape(text) for text in texts.gather(escaped)]
            texts = texts.clone().scatter(escaped, plain)
    if "nfc" in steps:
        texts = texts.str.normalize("NFC")
    if "control" in steps:
        texts = texts.str.replace_all(r"\p{Cc}+", " ")
    return texts.str.strip_chars().replace("", None)


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


def _joined(frame: pl.DataFrame, view: TextView) -> pl.Series:
    """ "title: Toy Story genres: Animation Comedy", blank columns left out; null where all are."""
    cells = pl.DataFrame([shown(frame, name, view.clean).alias(name) for name in view.columns])
    parts = [pl.lit(f"{name}: ") + pl.col(name) for name in view.columns]
    joined = pl.concat_str(parts, separator=" ", ignore_nulls=True)
    return cells.select(pl.when(joined != "").then(joined).alias("value"))["value"]


def _values(frame: pl.DataFrame, view: CategoryView) -> pl.Expr:
    if not isinstance(frame.schema[view.column], pl.List) and not view.separator:
        value = _text(frame, view.column)
        value = pl.when(value != "").then(value)
        return pl.when(value.is_not_null()).then(value.reshape((-1, 1)).arr.to_list())
    if isinstance(frame.schema[view.column], pl.List):
        values = pl.col(view.column).cast(LIST)
    else:
        values = _text(frame, view.column).str.split(str(view.separator))
    clean = values.list.eval(pl.element().str.strip_chars().replace("", None).drop_nulls())
    return pl.when(clean.list.len() > 0).then(clean)
