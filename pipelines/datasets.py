"""Prepared data as mvrec_core reads it: a user's views are a zip of files, never a join."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.catalog import Catalog
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.features import Fitted
from mvrec_core.sequences import Histories
from mvrec_core.shards import Shards
from mvrec_core.views import OF_EVENTS
from pipelines.catalogue import SCHEMA_VERSION


def load(config: Config, test: bool = False) -> Data:
    """The prepared data of a run: what training may read, or with `test` all of it.

    Raises DataError where there is none, or it lacks a view of the configuration.
    """
    root = config.run_dir / "prepared"
    while True:
        there = _whole(root).stat().st_ino
        try:
            data = _load(config, root, test)
        except FileNotFoundError:
            if root.exists() and root.stat().st_ino == there:
                raise
            continue  # another run published meanwhile
        if root.exists() and root.stat().st_ino == there:
            return data


def training(config: Config) -> tuple[Data, Shards]:
    """What training reads of a run's prepared data: all but the users, and the users' train and validation events, no
    more of them at a time than train.events_at_once.

    Raises DataError as `load`; and when a shard is read, where the data was prepared anew meanwhile.
    """
    root = config.run_dir / "prepared"
    there = _whole(root).stat().st_ino
    parts = _parts(root)
    data = _load(config, root, test=False, parts=parts[:1])
    data = dataclasses.replace(data, users=data.users.slice(0, 0))

    @functools.lru_cache(maxsize=1)
    def read(chosen: tuple[int, ...]) -> Histories:
        if root.stat().st_ino != there:
            raise DataError(f"{root}: was prepared anew while it was read; start again")
        users = _users(config, root, [parts[place] for place in chosen], test=False)
        return dataclasses.replace(data, users=users).histories(config)

    events = [_events(root / "events" / part / "part-0.parquet") for part in parts]
    return data, Shards(events, read, config.train.events_at_once)


def users(config: Config) -> Iterator[pa.Table]:
    """All users with all their events, some at a time: a table as Data.users."""
    root = config.run_dir / "prepared"
    return (_users(config, root, [part], test=True) for part in _parts(root))


def _load(config: Config, root: Path, test: bool, parts: Sequence[str] | None = None) -> Data:
    """parts: of the users; None: all"""
    tree = json.loads((root / "views.json").read_text(encoding="utf-8")) if (root / "views.json").exists() else {}
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{root}: expected schema version {SCHEMA_VERSION}, found {tree.get('schema_version', 1)}; "
            "run 'mvrec prepare' again"
        )
    for name, view in config.views.items():
        if name not in tree["views"] and view.kind not in OF_EVENTS:
            there = ", ".join(sorted(tree["views"]))
            raise DataError(f"{root}: has no view '{name}' (it has {there}); run 'mvrec prepare --only-view {name}'")
    items = {"item_id": _column(root / "items" / "id.parquet", "item_id")}
    items["display"] = _column(root / "items" / "display.parquet", "value")
    for name, view in config.views_at("item").items():
        if view.kind not in OF_EVENTS:
            items[name] = _column(root / "items" / f"{name}.parquet", "value")
    users = _users(config, root, _parts(root) if parts is None else parts, test)
    return Data(Catalog(pa.table(items)), Fitted.load(root / "fitted.json"), users)


def _whole(root: Path) -> Path:
    if not (root / "manifest.json").is_file():
        raise DataError(f"{root}: no prepared data (no manifest.json); run 'mvrec prepare' first")
    return root


def _parts(root: Path) -> list[str]:
    return [path.name for path in sorted((root / "events").iterdir())]


def _events(path: Path) -> int:
    """How many events a part stores, by the file's footer; a user without any counts as one."""
    groups = pq.read_metadata(path)
    leaf = groups.schema.names.index("user_id") + 1  # the list "item" comes next
    return sum(groups.row_group(number).column(leaf).num_values for number in range(groups.num_row_groups))


def _users(config: Config, root: Path, parts: Sequence[str], test: bool) -> pa.Table:
    """A row a user, bucket by bucket: user_id, lists item, timestamp, split, "event.<view>", and "user.<view>"."""
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
