"""Items and users: the rows of raw files in, one row an id out, and why each other row was not taken.

    read each chunk -> refuse rows without an id or a usable date -> settle the ids that several rows describe

Rows are compared cell by cell, as text without the blanks around it; the digest of a vector stands for it. A missing
cell disagrees with nothing, and the date of a row is no cell: a later row that says the same is a duplicate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import polars as pl

from mvrec_core.config import Config
from mvrec_core.data import TableSource, Temporal
from mvrec_core.errors import DataError
from mvrec_core.schema import (
    LIST,
    Columns,
    instant,
    invalid_ids,
    read_ids,
    read_timestamps,
    read_value,
    shown,
    unreadable,
)
from mvrec_core.views import OF_EVENTS, NumberView, TextView, VectorView, View
from pipelines import raw
from pipelines.vectors import Vectors

LOSES = {  # policy -> why a row of an id is not kept beside the one that is
    "newest": "older row of the id",
    "most_frequent": "merged into another row of the id",
    "error": "merged into another row of the id",  # the rows agree; together they say the most
}
SHOWN = 120  # characters of a value in a message


@dataclass(frozen=True)
class Table:
    """Items or users, one row an id, ids in the order in which usable rows first name them.

    frame:     item_id or user_id; "view.<name>" for each view of columns; for items "display", what people see
    rows:      that came in: len(frame) + len(rejected)
    rejected:  columns source, file, row, raw, reason, in the order of files and rows
    unread:    number view -> cells of the frame's rows that hold something else than a number
    conflicts: column -> ids whose usable rows give it several values; columns without any are left out
    """

    frame: pl.DataFrame
    rows: int
    rejected: pl.DataFrame
    unread: dict[str, int]
    conflicts: dict[str, int]


def read(config: Config, key: Literal["items", "users"], files: Sequence[str]) -> Table:
    """The table that data.items or data.users describes.

    Raises DataError where no row can be used and, with conflicts: error, where rows of an id disagree;
    ConfigError where the instant in the config is none.
    """
    source: TableSource = getattr(config.data, key)
    columns = Columns.of(config, key)
    id_name = columns.names[0]
    compared = [name for name in columns.names[1:] if not (name == "timestamp" and _dated(source))]

    vectors = {view.column: Vectors(view) for view in columns.views.values() if _here(view)}
    keys, cells, refused = _usable(config, key, columns.names, files, vectors)
    rows = len(keys) + len(refused)
    if keys.is_empty():
        raise DataError(_none_usable(key, files, refused))
    settled = _settle(keys, cells, compared, source.conflicts)
    if source.conflicts == "error" and settled.conflicts:
        raise DataError(_disagreement(key, id_name, keys, cells, list(settled.conflicts), files))
    taken = cells[settled.places].with_columns(settled.merged)
    losers = keys[settled.losers["place"]].select("file", "row").with_columns(settled.losers["reason"])
    rejected = pl.concat([refused, _with_raw(losers, source, files)]).sort("file", "row")

    values = {
        f"view.{name}": vectors[view.column].of(taken[view.column]) if _here(view) else read_value(taken, view)
        for name, view in columns.views.items()
        if view.kind not in (*OF_EVENTS, "vector") or _here(view)
    }
    if key == "items":
        text = next((view for view in columns.views.values() if isinstance(view, TextView)), None)
        blank = pl.repeat(None, len(taken), dtype=pl.String, eager=True)
        values["display"] = shown(taken, text.columns[0], text.clean) if text else blank
    return Table(
        pl.DataFrame({id_name: taken[id_name], **values}),
        rows,
        rejected.select(
            pl.lit(key).alias("source"),
            pl.col("file").replace_strict(dict(enumerate(files)), return_dtype=pl.String),
            "row",
            "raw",
            "reason",
        ),
        {name: unreadable(taken, view) for name, view in columns.views.items() if isinstance(view, NumberView)},
        settled.conflicts,
    )


def _here(view: View) -> TypeGuard[VectorView]:
    """Whether the view's vectors are a column of this table."""
    return isinstance(view, VectorView) and view.path is None


# rows that can be used


def _usable(
    config: Config, key: str, names: Sequence[str], files: Sequence[str], vectors: Mapping[str, Vectors]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Two frames about the usable rows, in the order of files and rows: their keys (id; date in microseconds, null
    where rows have none; file, its place in files; row) and their cells (the columns `names`, with digests for
    vectors); and the refused rows (file, row, raw, reason)."""
    source: TableSource = getattr(config.data, key)
    keys = [pl.DataFrame(schema={"id": pl.String, "date": pl.Int64, "file": pl.Int32, "row": pl.Int64})]
    refused = [pl.DataFrame(schema={"file": pl.Int32, "row": pl.Int64, "raw": pl.String, "reason": pl.String})]
    cells = []
    for number, file in enumerate(files):
        for chunk in raw.chunks(file, source, names):
            frame = read_ids(chunk.frame, names[:1])
            frame = frame.with_columns(one.digests(frame[name], file, chunk.rows) for name, one in vectors.items())
            dates, reasons = _check(config, key, frame)
            there = frame.select(
                pl.col(names[0]).alias("id"), dates, pl.lit(number, pl.Int32).alias("file"), chunk.rows.alias("row")
            )
            keys.append(there.filter(reasons.is_null()))
            cells.append(frame.select(names).filter(reasons.is_null()))
            out = reasons.is_not_null()
            places = out.arg_true().to_list()
            texts = pl.Series("raw", chunk.whole(places) if places else [], pl.String)
            refused.append(there.filter(out).select("file", "row").with_columns(texts, reasons.filter(out)))
            broken = [
                {"file": number, "row": row, "raw": json.dumps({"text": text}, ensure_ascii=False), "reason": reason}
                for row, text, reason in chunk.bad
            ]
            refused.append(pl.DataFrame(broken, schema=refused[0].schema))
    return pl.concat(keys), _as_text(cells, names), pl.concat(refused).sort("file", "row")


def _check(config: Config, key: str, frame: pl.DataFrame) -> tuple[pl.Series, pl.Series]:
    """The dates of rows, and the reasons why they cannot be used, null where they can."""
    source: TableSource = getattr(config.data, key)
    dates, reason = pl.lit(None, pl.Int64), invalid_ids(frame.columns[:1])
    if _dated(source):
        read, why = read_timestamps(frame.select("timestamp"), source.timestamp_unit)
        dates = pl.lit(read["timestamp"])
        undated = pl.when(dates.is_null()).then(pl.lit(why))
        limit, split = source.before, config.data.split
        where = f"data.{key}.before"
        if limit is None and isinstance(split, Temporal):
            limit, where = split.valid_from, "data.split.valid_from"
        late = pl.lit(None, pl.String)
        if limit is not None:
            late = pl.when(dates >= instant(limit, where)).then(pl.lit(f"dated from {limit} on"))
        reason = pl.coalesce(reason, undated, late)
    both = frame.with_columns(dates.alias("date"), reason.alias("reason"))
    return both["date"], both["reason"]


def _dated(source: TableSource) -> bool:
    return source.columns.get("timestamp") is not None


def _as_text(chunks: Sequence[pl.DataFrame], names: Sequence[str]) -> pl.DataFrame:
    """One frame of text without blanks around it, or of lists of such text where any chunk has lists; null where
    nothing is left."""
    lists = [name for name in names if any(isinstance(chunk.schema[name], pl.List) for chunk in chunks)]
    element = pl.element().str.strip_chars().replace("", None).drop_nulls()
    frames = []
    for chunk in chunks:
        frame = read_ids(chunk, [name for name in names if not isinstance(chunk.schema[name], pl.List)])
        for name in lists:
            column = pl.col(name)
            if isinstance(chunk.schema[name], pl.List):
                column = column.cast(LIST).list.eval(element)
                frame = frame.with_columns(pl.when(column.list.len() > 0).then(column))
            else:
                frame = frame.with_columns(pl.when(column.is_not_null()).then(pl.concat_list(column)))
        frames.append(frame)
    return pl.concat(frames) if frames else pl.DataFrame(schema=dict.fromkeys(names, pl.String))


# ids that several rows describe


@dataclass(frozen=True)
class _Settled:
    """places: of the kept rows, one an id; merged: columns to put in their place; losers: place, reason."""

    places: pl.Series
    merged: list[pl.Series]
    losers: pl.DataFrame
    conflicts: dict[str, int]


def _settle(keys: pl.DataFrame, cells: pl.DataFrame, columns: Sequence[str], policy: str) -> _Settled:
    """Of rows of one id that differ in `columns` the policy's choice, of equal ones the first."""
    ids = keys.select("id", "date").with_row_index("place")
    order = ids.select("id", "place").unique("id", keep="first", maintain_order=True)
    again = ids.filter(pl.col("id").is_duplicated())
    names = [f"cell.{column}" for column in columns]  # a column of the files may be called "id"
    again = again.with_columns(cells[column].gather(again["place"]).alias(f"cell.{column}") for column in columns)
    again = again.sort("date", "place").with_row_index("age")  # the last is the newest

    distinct = again.group_by("id", *names).agg(place=pl.col("place").min(), age=pl.col("age").max())
    distinct = distinct.select("id", "place", wins=pl.col("age") == pl.col("age").max().over("id"))
    winners = distinct.filter("wins").select("id", kept="place")
    losers = again.select("place").join(distinct.select("place", "wins"), on="place", how="left")
    why = pl.when(pl.col("wins").is_null()).then(pl.lit("duplicate row")).otherwise(pl.lit(LOSES[policy]))
    losers = losers.filter(~pl.col("wins").fill_null(False)).select("place", why.alias("reason"))
    kept = order.join(winners, on="id", how="left", maintain_order="left").select(pl.coalesce("kept", "place"))
    places = kept.to_series()

    conflicts, merged = {}, []
    for name, column in zip(names, columns, strict=True):
        votes = again.drop_nulls(name).group_by("id", name).agg(votes=pl.len(), age=pl.col("age").max())
        if differing := votes.filter(pl.col("id").is_duplicated())["id"].n_unique():
            conflicts[column] = differing
        if policy != "newest":  # duplicates vote too: what most rows say
            chosen = votes.sort("votes", "age").unique("id", keep="last").select("id", name)
            own = order.select("id", cells[column].gather(places).alias("own"))
            both = own.join(chosen, on="id", how="left", maintain_order="left")
            merged.append(both.select(pl.coalesce(name, "own").alias(column)).to_series())
    return _Settled(places, merged, losers, conflicts)


def _with_raw(rows: pl.DataFrame, source: TableSource, files: Sequence[str]) -> pl.DataFrame:
    """file, row, raw, reason of rows (file, row, reason) that lost after their chunk was gone."""
    rows = rows.sort("file", "row")
    texts: list[str] = []
    for (number,), part in rows.group_by("file", maintain_order=True):
        texts += raw.take(files[int(str(number))], source, part["row"].to_list())
    return rows.select("file", "row", pl.Series("raw", texts, pl.String), "reason")


# messages


def _none_usable(key: str, files: Sequence[str], refused: pl.DataFrame) -> str:
    if refused.is_empty():
        return f"data.{key}: 0 rows in {', '.join(files)}"
    number, row, text, reason = refused.row(0)
    return (
        f"data.{key}: all {len(refused)} rows were rejected; the first is row {row} of {files[number]}: "
        f"{reason}, in {_short(text)}"
    )


def _disagreement(
    key: str, id_name: str, keys: pl.DataFrame, cells: pl.DataFrame, columns: Sequence[str], files: Sequence[str]
) -> str:
    """About the first id whose rows differ in one of the columns: the first row, and the first that differs."""
    ids = pl.DataFrame({"id": keys["id"]}).with_row_index("place")
    ids = ids.with_columns(first=pl.col("place").min().over("id"))
    found: list[tuple[int, str, pl.DataFrame]] = []
    for column in columns:
        rows = ids.with_columns(value=cells[column]).drop_nulls("value").unique(["id", "value"], keep="first")
        rows = rows.filter(pl.col("id").is_duplicated()).sort("first", "place").head(2)
        found.append((rows["first"][0], column, rows))
    _, column, rows = min(found, key=lambda one: one[0])
    files_rows = keys[rows["place"]].select("file", "row").rows()
    first, second = (f"row {row} of {files[number]}" for number, row in files_rows)
    one, other = (_short(repr(value)) for value in rows["value"].to_list())
    return (
        f"data.{key}: {first} and {second} disagree about {column} of {id_name} '{rows['id'][0]}': {one} and {other}; "
        f"expected one value, or data.{key}.conflicts: newest or most_frequent"
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
