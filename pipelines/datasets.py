"""Prepared data as mvrec_core reads it: a user's views are a zip of files, never a join."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.catalog import Catalog
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.features import Fitted

SCHEMA_VERSION = 1


def load(config: Config) -> Data:
    """The prepared data of a run. Raises DataError where there is none, or it lacks a view of the configuration."""
    root = config.run_dir / "prepared"
    if not (root / "manifest.json").is_file():
        raise DataError(f"{root}: no prepared data (no manifest.json); run 'mvrec prepare' first")
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(f"{root}: expected schema version {SCHEMA_VERSION}, found {manifest['schema_version']}")
    prepared = set(manifest["config"]["views"])
    for name in config.views:
        if name not in prepared:
            raise DataError(
                f"{root}: has no view '{name}' (it has {', '.join(sorted(prepared))}); run 'mvrec prepare' again"
            )
    items = {"item_id": _column(root / "items" / "id.parquet", "item_id")}
    items["display"] = _column(root / "items" / "display.parquet", "value")
    for name, view in config.views_at("item").items():
        if view.kind != "id":
            items[name] = _column(root / "items" / f"{name}.parquet", "value")
    return Data(Catalog(pa.table(items)), Fitted.load(root / "fitted.json"), _users(config, root))


def _users(config: Config, root: Path) -> pa.Table:
    parts = [path.name for path in sorted((root / "events").iterdir())]
    users = pa.concat_tables(
        [pq.read_table(root / "events" / part / "part-0.parquet", partitioning=None) for part in parts]
    )
    for name in config.views_at("event"):
        values = [pq.read_table(root / "views" / name / part / "part-0.parquet", partitioning=None) for part in parts]
        users = users.append_column(f"event.{name}", pa.concat_tables(values)["value"])
    for name in config.views_at("user"):
        features = pq.read_table(root / "users" / f"{name}.parquet")
        place = pa.compute.index_in(users["user_id"].combine_chunks(), value_set=features["user_id"].combine_chunks())
        users = users.append_column(f"user.{name}", features["value"].combine_chunks().take(place))
    return users.combine_chunks()


def _column(path: Path, name: str) -> pa.ChunkedArray:
    return pq.read_table(path)[name]
