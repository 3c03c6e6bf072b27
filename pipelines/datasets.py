"""Prepared data as mvrec_core reads it: a user's views are a zip of files, never a join."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.catalog import Catalog
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.features import Fitted
from pipelines.catalogue import SCHEMA_VERSION


def load(config: Config, test: bool = False) -> Data:
    """The prepared data of a run: what training may read, or with `test` all of it.

    Raises DataError where there is none, or it lacks a view of the configuration.
    """
    root = config.run_dir / "prepared"
    while True:
        if not (root / "manifest.json").is_file():
            raise DataError(f"{root}: no prepared data (no manifest.json); run 'mvrec prepare' first")
        there = root.stat().st_ino
        try:
            data = _load(config, root, test)
        except FileNotFoundError:
            if root.exists() and root.stat().st_ino == there:
                raise
            continue  # another run published meanwhile
        if root.exists() and root.stat().st_ino == there:
            return data


def _load(config: Config, root: Path, test: bool) -> Data:
    tree = json.loads((root / "views.json").read_text(encoding="utf-8")) if (root / "views.json").exists() else {}
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{root}: expected schema version {SCHEMA_VERSION}, found {tree.get('schema_version', 1)}; "
            "run 'mvrec prepare' again"
        )
    for name in config.views:
        if name not in tree["views"]:
            there = ", ".join(sorted(tree["views"]))
            raise DataError(f"{root}: has no view '{name}' (it has {there}); run 'mvrec prepare --only-view {name}'")
    items = {"item_id": _column(root / "items" / "id.parquet", "item_id")}
    items["display"] = _column(root / "items" / "display.parquet", "value")
    for name, view in config.views_at("item").items():
        if view.kind != "id":
            items[name] = _column(root / "items" / f"{name}.parquet", "value")
    return Data(Catalog(pa.table(items)), Fitted.load(root / "fitted.json"), _users(config, root, test))


def _users(config: Config, root: Path, test: bool) -> pa.Table:
    """A row a user, bucket by bucket: user_id, lists item, timestamp, split, "event.<view>", and "user.<view>"."""
    parts = [path.name for path in sorted((root / "events").iterdir())]
    tables = [_histories(config, root, part) for part in parts]
    if test:
        held = [_histories(config, root / "test", part) for part in parts]
        tables = [_continued(*pair) for pair in zip(tables, held, strict=True)]
    users = pa.concat_tables(tables)
    for name in config.views_at("user"):
        features = pq.read_table(root / "users" / f"{name}.parquet")
        place = pa.compute.index_in(users["user_id"].combine_chunks(), value_set=features["user_id"].combine_chunks())
        users = users.append_column(f"user.{name}", features["value"].combine_chunks().take(place))
    return users.combine_chunks()


def _histories(config: Config, root: Path, part: str) -> pa.Table:
    users = pq.read_table(root / "events" / part / "part-0.parquet", partitioning=None)
    for name in config.views_at("event"):
        values = pq.read_table(root / "views" / name / part / "part-0.parquet", partitioning=None)
        users = users.append_column(f"event.{name}", values["value"])
    return users


def _continued(histories: pa.Table, later: pa.Table) -> pa.Table:
    """Each user's lists with the later ones behind them; users by id."""
    rows = pl.concat([pl.DataFrame(histories), pl.DataFrame(later)])
    joined = rows.group_by("user_id", maintain_order=True).agg(pl.all().explode()).sort("user_id")
    return joined.to_arrow().cast(histories.schema)


def _column(path: Path, name: str) -> pa.ChunkedArray:
    return pq.read_table(path)[name]
