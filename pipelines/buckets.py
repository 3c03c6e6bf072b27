"""One bucket of the spool, made into prepared data: cleaned, split, and written view by view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mvrec_core import cleaning
from mvrec_core.config import Config
from mvrec_core.data import Core
from mvrec_core.sealed import sha256
from mvrec_core.sequences import TEST, TRAIN, VALID
from mvrec_core.views import CategoryView, NumberView, VectorView, View
from pipelines import files, spool

PART = "bucket={:04d}/part-0.parquet"
SPINE = pa.schema([("user_id", pa.string()), ("item", pa.list_(pa.string())), ("timestamp", pa.list_(pa.int64())),
                   ("split", pa.list_(pa.int8()))])  # fmt: skip
CORE = "core"  # a working directory: gone before anything is published
DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class Made:
    """What one bucket adds to the manifest and to what is fitted.

    splits: events of train, valid, test            days: the same by day since 1970
    lengths: users by events, in ranges that end at a power of two
    fits:   of each event-level view what can be added up over buckets, from train only
    files:  sha256 of each file written
    """

    bucket: int
    kept: int
    users: int
    short_users: int
    reasons: dict[str, int]
    splits: list[int]
    days: dict[str, list[int]]
    lengths: dict[str, int]
    span: list[int] | None
    missing: dict[str, int]
    fits: dict[str, dict[str, Any]]
    files: dict[str, str] = field(default_factory=dict)


def make(
    config: Config,
    parts: Sequence[Path],
    bucket: int,
    buckets: int,
    out: Path,
    only: str | None = None,
) -> Made:
    """Writes a bucket below `out`: events/, views/, test/, spool/items/ and spool/late/; or one view's files only.

    Where there is a core, `write_core` has to come first. Raises ResourceError where the disk is full.
    """
    kept, gone = cleaned(config, spool.read(config, parts, bucket, buckets))
    core = config.data.clean.core
    if core is not None:
        ids = [pl.read_parquet(out / CORE / f"{name}.parquet").to_series() for name in ("users", "items")]
        kept, out_of_core = cleaning.part(kept, cleaning.outside_core(core, *ids))
        gone = pl.concat([gone, _noted(out_of_core)])
        if core.over == "all":
            kept = kept.with_columns(cleaning.split(kept, config.data.split))
    written: dict[str, str] = {}

    def write(name: str, table: pa.Table) -> None:
        files.write_parquet(out / name, table)
        written[name] = sha256(out / name)

    views = config.views_at("event")
    for top, rows in (("", kept.filter(pl.col("split") != TEST)), ("test/", kept.filter(pl.col("split") == TEST))):
        if only is None:
            lists = {"item": rows["item_id"], "timestamp": rows["timestamp"], "split": rows["split"]}
            write(f"{top}events/{PART.format(bucket)}", _lists(rows["user_id"], lists).cast(SPINE))
        for name, view in views.items():
            if only in (None, name):
                schema = pa.schema([("user_id", pa.string()), ("value", pa.list_(spool.VALUES[view.kind]))])
                values = rows["timestamp" if view.kind == "time" else f"view.{name}"]
                table = _lists(rows["user_id"], {"value": values}).cast(schema)
                write(f"{top}views/{name}/{PART.format(bucket)}", table)
    if only is None:
        _write_notes(out, bucket, kept, gone)
    return _made(config, bucket, kept, gone, views, written)


def cleaned(config: Config, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of a bucket in sequence order with the column split, and those left out as `_noted` gives them.

    All steps that look at one user; the core, which looks at all, comes after.
    """
    clean = config.data.clean
    read = [name for name in frame.columns if name.startswith("view.")]
    order = np.argsort(frame["timestamp"].to_numpy(), kind="stable")
    users = frame["user_id"].to_physical().to_numpy()[order]  # 16 bits where they suffice, which numpy sorts by radix
    order = order[np.argsort(users, kind="stable")]
    frame = frame[order]
    frame, gone = cleaning.clean(frame, clean, read)
    frame = frame.with_columns(cleaning.split(frame, config.data.split))
    gone = _noted(gone)
    if config.data.split.new_items:
        frame, new = cleaning.part(frame, cleaning.held_out(config.data.split.new_items))
        gone = pl.concat([gone, _noted(new)])
    if clean.max_history is not None:
        frame, old = cleaning.part(frame, cleaning.beyond(clean.max_history))
        gone = pl.concat([gone, _noted(old)])
    return frame, gone


def _noted(gone: pl.DataFrame) -> pl.DataFrame:
    """Rows left out: number, row, reason, and as JSON what the spool holds of them."""
    held = [name for name in gone.columns if name not in ("number", "row", "split", "reason")]
    return gone.select("number", "row", "reason", held=pl.struct(held).struct.json_encode())


def counted(config: Config, parts: Sequence[Path], bucket: int, buckets: int, out: Path) -> None:
    """Writes user_id and item_id of a bucket's events that count for the core."""
    frame, _ = cleaned(config, spool.read(config, parts, bucket, buckets))
    if config.data.clean.core is None or config.data.clean.core.over == "train":
        frame = frame.filter(pl.col("split") == TRAIN)
    files.write_parquet(
        out / CORE / f"pairs-{bucket:04d}.parquet", _plain(frame.select(pl.col("user_id", "item_id").cast(pl.String)))
    )


def write_core(core: Core, out: Path) -> None:
    """Writes the users and the items that are left when those with too few events go, again until none does."""
    rows = pl.scan_parquet(out / CORE / "pairs-*.parquet")
    users = items = None
    size = (-1, -1)
    while True:
        left = rows if users is None else rows.join(users.lazy(), on="user_id", how="semi")
        left = left if items is None else left.join(items.lazy(), on="item_id", how="semi")
        users = _frequent(left, "user_id", core.users)
        items = _frequent(left.join(users.lazy(), on="user_id", how="semi"), "item_id", core.items)
        if size == (size := (len(users), len(items))):
            files.write_parquet(out / CORE / "users.parquet", _plain(users))
            files.write_parquet(out / CORE / "items.parquet", _plain(items))
            return


def _frequent(rows: pl.LazyFrame, column: str, least: int) -> pl.DataFrame:
    counts = rows.group_by(column).len().filter(pl.col("len") >= least)
    return counts.select(column).collect(engine="streaming")


def _lists(users: pl.Series, columns: Mapping[str, pl.Series]) -> pa.Table:
    """A row a user of rows that are sorted by user: user_id, and the user's values of each column as a list."""
    starts = cleaning.starts(users)
    offsets = pa.array(np.append(starts, len(users)), pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, values.to_arrow()) for name, values in columns.items()}
    return pa.table({"user_id": users[starts].to_arrow()} | lists)


def notes(bucket: int) -> tuple[str, str]:
    """The files that hold what the whole run needs of a bucket: its items, and the rows left out."""
    return f"spool/items/{bucket:04d}.parquet", f"spool/late/{bucket:04d}.parquet"


def _write_notes(out: Path, bucket: int, kept: pl.DataFrame, gone: pl.DataFrame) -> None:
    ids = kept["item_id"].dtype.categories  # type: ignore[attr-defined]
    codes = kept["item_id"].to_physical().to_numpy()
    train = codes[(kept["split"] == TRAIN).to_numpy()]
    counts = {"train": np.bincount(train, minlength=len(ids)), "events": np.bincount(codes, minlength=len(ids))}
    items = pl.DataFrame({"item_id": ids} | counts).filter(pl.col("events") > 0)
    for name, frame in zip(notes(bucket), (items, gone.sort("number", "row")), strict=True):
        files.write_parquet(out / name, _plain(frame))


def _plain(frame: pl.DataFrame) -> pa.Table:
    """With plain strings, which Parquet readers agree on."""
    table = frame.to_arrow()
    kinds = [pa.string() if pa.types.is_large_string(field.type) else field.type for field in table.schema]
    return table.cast(pa.schema(zip(table.column_names, kinds, strict=True)))


def _made(
    config: Config,
    bucket: int,
    kept: pl.DataFrame,
    gone: pl.DataFrame,
    views: Mapping[str, View],
    written: dict[str, str],
) -> Made:
    starts = cleaning.starts(kept["user_id"])
    sizes = np.diff(starts, append=len(kept))
    held = np.add.reduceat((kept["split"] != TRAIN).to_numpy(), starts) if len(kept) else np.zeros(0)
    train = kept["split"] == TRAIN
    splits = [TRAIN, VALID, TEST]
    cells, counts = np.unique((kept["timestamp"] // DAY * len(splits) + kept["split"]).to_numpy(), return_counts=True)
    days: dict[str, list[int]] = {}
    for cell, events in zip(cells.tolist(), counts.tolist(), strict=True):
        days.setdefault(str(cell // len(splits)), [0] * len(splits))[cell % len(splits)] = events
    lengths = Counter[str]()
    for events, users in zip(*np.unique(sizes, return_counts=True), strict=True):
        lengths[str(1 << (int(events) - 1).bit_length())] += int(users)
    return Made(
        bucket=bucket,
        kept=len(kept),
        users=len(starts),
        short_users=int((held == 0).sum()) if config.data.split.kind != "temporal" else 0,
        reasons=dict(Counter(gone["reason"].to_list())),
        splits=[int((kept["split"] == split).sum()) for split in splits],
        days=days,
        lengths=dict(lengths),
        span=[kept["timestamp"].min(), kept["timestamp"].max()] if len(kept) else None,  # type: ignore[list-item]
        missing={name: 0 if view.kind == "time" else kept[f"view.{name}"].null_count() for name, view in views.items()},
        fits={
            name: sums(kept[f"view.{name}"].filter(train), view) for name, view in views.items() if view.kind != "time"
        },
        files=written,
    )


def sums(values: pl.Series, view: View) -> dict[str, Any]:
    """What can be added up over buckets: distinct categories, or count, mean and squared deviations of numbers, of
    vectors number by number."""
    if isinstance(view, CategoryView):
        return {"values": values.explode().drop_nulls().unique().sort().to_list()}
    if isinstance(view, NumberView):
        there = values.drop_nulls().to_numpy()
        mean = float(there.mean()) if len(there) else 0.0
        return {"count": len(there), "mean": mean, "squares": float(((there - mean) ** 2).sum())}
    if isinstance(view, VectorView):
        lists = values.drop_nulls()
        if lists.is_empty():
            return {"count": 0, "mean": [], "squares": []}
        matrix = lists.explode().to_numpy().astype(np.float64).reshape(len(lists), -1)
        means = matrix.mean(0)
        return {"count": len(lists), "mean": means.tolist(), "squares": ((matrix - means) ** 2).sum(0).tolist()}
    return {}


def fit(view: View, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the sums of each bucket: a view's categories, or the mean and deviation of its numbers, merged as in Chan et
    al. 1979 (E[x^2] - E[x]^2 cancels for large values); nothing for the other kinds."""
    if isinstance(view, CategoryView):
        return {"kind": "category", "values": sorted({value for part in parts for value in part["values"]})}
    if not isinstance(view, (NumberView, VectorView)):
        return {}
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for part in (part for part in parts if part["count"]):
        total, delta = count + part["count"], np.array(part["mean"]) - mean
        squares = squares + part["squares"] + delta**2 * count * part["count"] / total
        mean, count = mean + delta * part["count"] / total, total
    deviation = np.sqrt(squares / max(1, count))
    deviation = np.where(deviation > 0, deviation, 1.0)
    if isinstance(view, VectorView):
        return {"kind": "vector", "mean": mean.tolist(), "std": deviation.tolist(), "count": count}
    return {"kind": "number", "mean": float(mean[0]), "std": float(deviation[0]), "count": count}
