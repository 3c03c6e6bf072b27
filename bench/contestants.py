"""The contestants of bench_prepare.py: each sets itself up and returns the work to be timed, which returns facts for
the report. Imports are inside functions: a contestant's process should hold only what it uses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORES = 2
LAST = 253_402_300_799  # the last second of year 9999: a timestamp beyond is none

Work = Callable[[], dict[str, Any]]


def tree(name: str, source: Path, runs: Path, all_views: bool) -> dict[str, Any]:
    """Our configuration. `all_views`: the event's kind, price and time too, not the lists alone."""
    views: dict[str, Any] = {"id": {"kind": "id"}}
    if all_views:
        views |= {
            "kind": {"kind": "category", "level": "event", "column": "event"},
            "price": {"kind": "number", "level": "event", "column": "price"},
            "time": {"kind": "time"},
        }
    data = {"events": {"path": str(source), "timestamp_unit": "s"}, "split": {"kind": "leave_one_out"}}
    return {"name": name, "runs": str(runs), "data": data, "views": views}


def _ours(name: str, source: Path, out: Path, cpus: int) -> Work:
    import logging

    import ray.data

    from mvrec_core.reading import parse_config
    from pipelines.prepare import prepare

    began = time.perf_counter()
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.get([ray.remote(_import_in_worker).remote() for _ in range(cpus)])
    started = time.perf_counter() - began
    config = parse_config(tree(name, source / "*.parquet", out, all_views=name == "all"), "the benchmark")

    def work() -> dict[str, Any]:
        manifest = prepare(config, log=lambda line: None)
        return {"ray_start": started, "content_hash": manifest["content_hash"], "rows": manifest["rows"]["events"]}

    return work


def _import_in_worker() -> None:
    import ray.data  # noqa: F401

    import pipelines.prepare  # noqa: F401

    time.sleep(0.5)  # so that each worker gets one of these tasks


def _polars(source: Path, out: Path, sort_first: bool) -> Work:
    import polars as pl

    def work() -> dict[str, Any]:
        rows = pl.scan_parquet(source / "*.parquet").select("user_id", "item_id", "timestamp")
        rows = rows.filter(pl.col("user_id", "item_id").is_not_null(), pl.col("timestamp") <= LAST)
        item, when = pl.col("item_id").alias("item"), pl.col("timestamp")
        if sort_first:
            users = rows.sort("timestamp", maintain_order=True).group_by("user_id").agg(item, when)
        else:
            event = pl.struct(item, when).sort_by("timestamp", maintain_order=True).alias("event")
            field = pl.col("event").list.eval
            users = rows.group_by("user_id").agg(event)
            users = users.select(
                "user_id", **{name: field(pl.element().struct[name]) for name in ("item", "timestamp")}
            )
        users.collect(engine="in-memory").write_parquet(out / "lists.parquet", compression="zstd")
        return {}

    return work


def _duckdb(source: Path, out: Path) -> Work:
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET threads = {CORES}; SET preserve_insertion_order = false")  # the sort key has the place

    def work() -> dict[str, Any]:
        connection.execute(f"""
            COPY (
                SELECT user_id, [e.item for e in events] AS item, [e.time for e in events] AS timestamp FROM (
                    SELECT user_id, list_sort(list(
                        {{time: timestamp, file: file_index, row: file_row_number, item: item_id}})) AS events
                    FROM read_parquet('{source}/*.parquet')
                    WHERE user_id IS NOT NULL AND item_id IS NOT NULL AND timestamp <= {LAST}
                    GROUP BY user_id))
            TO '{out}/lists.parquet' (FORMAT parquet, COMPRESSION zstd)""")
        return {}

    return work


def _pandas(source: Path, out: Path) -> Work:
    import pandas as pd
    import pyarrow

    pyarrow.set_cpu_count(CORES)

    def work() -> dict[str, Any]:
        parts = [pd.read_parquet(f, columns=["user_id", "item_id", "timestamp"]) for f in sorted(source.glob("*"))]
        rows = pd.concat(parts, ignore_index=True)
        rows = rows[rows["user_id"].notna() & rows["item_id"].notna() & (rows["timestamp"] <= LAST)]
        rows = rows.astype({"item_id": object, "timestamp": "int64"}).sort_values("timestamp", kind="stable")
        users = rows.groupby("user_id", sort=False)
        users = users.agg(item=("item_id", list), timestamp=("timestamp", list)).reset_index()
        users.to_parquet(out / "lists.parquet", compression="zstd", index=False)
        return {}

    return work


def contestant(name: str, source: Path, out: Path, cpus: int) -> Work:
    if name in ("lists", "all"):
        return _ours(name, source, out, cpus)
    if name in ("polars_sort_group", "polars_group_sort"):
        return _polars(source, out, sort_first=name == "polars_sort_group")
    return {"duckdb": _duckdb, "pandas": _pandas}[name](source, out)


def compete(name: str, source: Path, out: Path, cpus: int, result: Path) -> None:
    """What a contestant's process does: the work under the clock, and what there is to say about it into `result`."""
    work = contestant(name, source, out, cpus)
    began = time.perf_counter()
    facts = work()
    result.write_text(json.dumps(facts | {"seconds": time.perf_counter() - began}))
