"""The catalogue and the profiles as prepared data holds them, and what is fitted on train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.sequences import TRAIN
from mvrec_core.views import OF_EVENTS
from pipelines import files
from pipelines.buckets import Made, fit, sums
from pipelines.spool import VALUES
from pipelines.tables import Table

SCHEMA_VERSION = 2  # of prepared data


def write(
    config: Config,
    made: Sequence[Made],
    tables: Mapping[str, Table],
    vectors: Mapping[str, pl.DataFrame],
    out: Path,
    only: str | None,
) -> dict[str, Any]:
    """Writes items/, users/, fitted.json and views.json, or of items/ and users/ one view only; the facts about them
    for the manifest. vectors: of the views that have files of their own, item_id and value."""
    logged = _items_of_log(out)
    items, unknown = _catalogue(logged, tables.get("items"))
    for name, frame in vectors.items():
        own = frame.rename({"value": f"view.{name}"})
        items = items.join(own, on="item_id", how="left", maintain_order="left")
    if only is None:
        files.write_parquet(out / "items" / "id.parquet", _table(items.select("item_id"), {"item_id": pa.string()}))
        display = pl.col("display") if "display" in items.columns else pl.lit(None, pl.String)
        _write_values(out / "items" / "display.parquet", items.select("item_id", value=display), pa.string())
    in_train = items.join(logged.filter(pl.col("train") > 0), on="item_id", how="semi")
    fitted: dict[str, Any] = {}
    missing: dict[str, tuple[int, int]] = {}  # view -> values, of them missing
    for name, view in config.views_at("item").items():
        if view.kind in OF_EVENTS:
            missing[name] = len(items), 0
            continue
        values = items.select("item_id", value=f"view.{name}")
        if only in (None, name):
            _write_values(out / "items" / f"{name}.parquet", values, VALUES[view.kind])
        missing[name] = len(values), values["value"].null_count()
        fitted[name] = fit(view, [sums(in_train[f"view.{name}"], view)])
        if view.kind == "vector" and not fitted[name]["count"]:
            fitted[name] |= _unfitted(name, values["value"])
    for name, view in config.views_at("event").items():
        missing[name] = sum(one.kept for one in made), sum(one.missing[name] for one in made)
        if view.kind != "time":
            fitted[name] = fit(view, [one.fits[name] for one in made])
    for name, view in config.views_at("user").items():
        users = tables["users"].frame
        active = users.join(_train_users(out), on="user_id", how="semi")
        values = users.select("user_id", value=f"view.{name}")
        if only in (None, name):
            _write_values(out / "users" / f"{name}.parquet", values, VALUES[view.kind])
        missing[name] = len(values), values["value"].null_count()
        fitted[name] = fit(view, [sums(active[f"view.{name}"], view)])
    files.write_text(out / "fitted.json", _json({name: one for name, one in fitted.items() if one}))
    views = json.loads(config.model_dump_json(include={"views"}))["views"]
    for view in views.values():
        view.pop("path", None)  # where the files lay; prepared data is the same wherever that is
    files.write_text(out / "views.json", _json({"schema_version": SCHEMA_VERSION, "views": views}))
    text = config.text_view
    return {
        "items": len(items),
        "item_events": logged["events"].to_numpy(),
        "items_without_text": missing[text][1] if text else None,
        "unknown_items": unknown,
        "missing": missing,
        "vocabulary": {name: len(one["values"]) for name, one in fitted.items() if one.get("kind") == "category"},
    }


def _items_of_log(out: Path) -> pl.DataFrame:
    """item_id, train, events: the items of the log with their events in train and in all, by item_id."""
    found = pl.scan_parquet(out / "spool" / "items" / "*.parquet").group_by("item_id").agg(pl.all().sum())
    return found.sort("item_id").collect(engine="streaming")


def _catalogue(logged: pl.DataFrame, given: Table | None) -> tuple[pl.DataFrame, int]:
    """The given items, then those that only train events know; and the number of items that the log knows alone."""
    frame = given.frame if given is not None else pl.DataFrame(schema={"item_id": pl.String})
    strange = logged.join(frame, on="item_id", how="anti")
    items = pl.concat([frame, strange.filter(pl.col("train") > 0).select("item_id").sort("item_id")], how="diagonal")
    return items, len(strange) if given is not None else 0


def _unfitted(name: str, vectors: pl.Series) -> dict[str, Any]:
    """The scale of vectors that no item of train has: they stay as they are. Raises DataError where no item has one."""
    sizes = vectors.drop_nulls().list.len()
    if sizes.is_empty():
        raise DataError(
            f"views.{name}: expected vectors of items of the catalogue, found one for none of {len(vectors)}"
        )
    return {"mean": [0.0] * sizes[0], "std": [1.0] * sizes[0]}


def _train_users(out: Path) -> pl.DataFrame:
    """user_id of the users with train events."""
    spine = pl.scan_parquet(out / "events" / "*" / "*.parquet", hive_partitioning=False)
    return spine.filter(pl.col("split").list.contains(TRAIN)).select("user_id").collect(engine="streaming")


def _write_values(path: Path, frame: pl.DataFrame, kind: pa.DataType) -> None:
    files.write_parquet(path, _table(frame, {frame.columns[0]: pa.string(), "value": kind}))


def _table(frame: pl.DataFrame, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    return frame.to_arrow().cast(pa.schema(list(kinds.items()))).combine_chunks()


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, sort_keys=True, indent=1)
