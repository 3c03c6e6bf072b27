"""Raw logs -> validated events -> bucketed per-view Parquet, items, users, what was rejected, and a manifest.

    read (a task a file) -> check each row -> repartition by bucket -> sort, split and write each bucket

Every row takes this one way: a row that is not taken carries its reason and ends in rejected/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.config import CategoryView, Config, NumberView, Temporal
from mvrec_core.errors import ConfigError, DataError
from mvrec_core.schema import Columns, invalid_ids, read_ids, read_timestamps, read_value, shown, unreadable
from mvrec_core.sequences import TEST, TRAIN, VALID
from pipelines import raw
from pipelines.cluster import connect
from pipelines.publish import publish

SCHEMA_VERSION = 1
VALUE_TYPES = {"text": pa.string(), "category": pa.list_(pa.string()), "number": pa.float64(), "time": pa.int64()}
REJECTED = pa.schema(
    [("source", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("raw", pa.string()), ("reason", pa.string())]
)


def prepare(config: Config, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes <run>/prepared whole or not at all, and returns its manifest. Raises DataError."""
    began = time.perf_counter()
    sources = {key: raw.find(getattr(config.data, key), f"data.{key}") for key in ("events", "items", "users")
               if getattr(config.data, key) is not None}  # fmt: skip
    for key, files in sources.items():
        for file in files:
            raw.check_columns(file, getattr(config.data, key), dict(Columns.of(config, key).needed), f"data.{key}")
    cuts = _cuts(config)
    target = config.run_dir / "prepared"
    aside = target.with_name(f"prepared.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        tables: dict[str, _Table] = {
            key: _Table.read(config, key, sources[key]) for key in ("items", "users") if key in sources
        }
        connect()
        log(f"prepare: reading {len(sources['events'])} event file(s) into {config.data.buckets} buckets")
        stats = _events(config, sources["events"], cuts, aside, log)
        rejected = _count_reasons(stats, tables)
        if not sum(s["kept"] for s in stats):
            raise DataError(_nothing_kept(sources["events"], aside, sum(s["rows"] for s in stats)))
        facts = _items_and_users(config, stats, tables, aside)
        pq.write_table(_rejected_tables(tables), aside / "rejected" / "part-items-users.parquet")
        manifest = _manifest(config, sources, stats, tables, rejected, facts, aside)
        _write(aside / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _summarise(manifest, target, time.perf_counter() - began, log)
    return manifest


# events


def _events(
    config: Config, files: Sequence[str], cuts: tuple[int, int] | None, out: Path, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Writes events/, views/ and rejected/ of every bucket; the buckets' counts, in bucket order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told below, in our words
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    buckets, out = config.data.buckets, out.absolute()
    stream: ray.data.Dataset = ray.data.from_items(
        [{"number": n, "file": f} for n, f in enumerate(files)], override_num_blocks=len(files)
    )
    stream = stream.map_batches(
        lambda batch: _read(config, batch), batch_size=1, batch_format="pyarrow", zero_copy_batch=True
    )
    stream = stream.repartition(buckets, keys=["bucket"])
    stream = stream.map_batches(
        lambda batch: _write_buckets(config, cuts, out, batch), batch_size=None, batch_format="pyarrow"
    )
    stats: dict[int, dict[str, Any]] = {}
    try:
        for row in stream.iter_rows():
            one = json.loads(row["stats"])
            stats[one["bucket"]] = one
            log(f"prepare: bucket {len(stats)}/{buckets} written, {one['kept']:,} events of {one['users']:,} users")
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, DataError) else error) from None
    empty = pl.DataFrame(_events_schema(config).empty_table())
    for bucket in sorted(set(range(buckets)) - set(stats)):
        stats[bucket] = _write_bucket(config, cuts, out, bucket, empty)
    return [stats[bucket] for bucket in range(buckets)]


def _events_schema(config: Config) -> pa.Schema:
    fixed = [("bucket", pa.int32()), ("number", pa.int32()), ("file", pa.string()), ("row", pa.int64()),
             ("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()),
             ("reason", pa.string()), ("raw", pa.string())]  # fmt: skip
    views = [(f"view.{name}", VALUE_TYPES[view.kind]) for name, view in config.views_at("event").items()]
    unread = [
        (f"unread.{name}", pa.int64()) for name, view in config.views_at("event").items() if view.kind == "number"
    ]
    return pa.schema(fixed + views + unread)


def _read(config: Config, batch: pa.Table) -> Iterator[pa.Table]:
    """The checked rows of the files in a batch, every row of the log once."""
    for number, file in zip(batch["number"].to_pylist(), batch["file"].to_pylist(), strict=True):
        columns = Columns.of(config, "events")
        for chunk in raw.chunks(file, config.data.events, dict(columns.needed)):
            yield _checked(config, columns, number, file, chunk)


def _checked(config: Config, columns: Columns, number: int, file: str, chunk: raw.Chunk) -> pa.Table:
    schema = _events_schema(config)
    frame = read_ids(chunk.frame, ["user_id", "item_id"])
    frame, no_time = read_timestamps(frame, config.data.events)
    reason = frame.select(
        pl.coalesce(
            invalid_ids(["user_id", "item_id"]), pl.when(pl.col("timestamp").is_null()).then(pl.lit(no_time))
        ).alias("r")
    )["r"]
    refused = reason.is_not_null().arg_true().to_list()
    texts: list[str | None] = [None] * len(frame)
    for place, text in zip(refused, chunk.whole(refused) if refused else [], strict=True):
        texts[place] = text
    data: dict[str, Any] = {
        "bucket": bucket_of(frame["user_id"], config.data.buckets),
        "number": np.full(len(frame), number, np.int32),
        "file": [file] * len(frame),
        "row": chunk.rows,
        "user_id": frame["user_id"],
        "item_id": frame["item_id"],
        "timestamp": frame["timestamp"],
        "reason": reason,
        "raw": pl.Series(texts, dtype=pl.String),
    }
    for name, view in columns.views.items():
        data[f"view.{name}"] = read_value(frame, view)
        if isinstance(view, NumberView):
            data[f"unread.{name}"] = np.r_[unreadable(frame, view), np.zeros(max(0, len(frame) - 1), int)][: len(frame)]
    table = _table(pl.DataFrame(data), schema)
    if chunk.bad:
        nulls: dict[str, Any] = {name: [None] * len(chunk.bad) for name in schema.names}
        nulls |= {
            "bucket": [0] * len(chunk.bad),
            "number": [number] * len(chunk.bad),
            "file": [file] * len(chunk.bad),
            "row": [row for row, _, _ in chunk.bad],
            "raw": [json.dumps({"text": text}, ensure_ascii=False) for _, text, _ in chunk.bad],
            "reason": [reason for _, _, reason in chunk.bad],
        }
        table = pa.concat_tables([table, pa.table(nulls, schema=schema)])
    return table


def bucket_of(user_ids: pl.Series, buckets: int) -> np.ndarray:
    """int32 [n]: a stable 64-bit hash (pandas.util.hash_array) of each id modulo the buckets; 0 for null."""
    codes = user_ids.to_arrow().dictionary_encode()
    distinct = np.asarray(codes.dictionary.to_pylist(), dtype=object)
    hashed = (pd.util.hash_array(distinct, categorize=False) % buckets).astype(np.int32) if len(distinct) else None
    rows = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.zeros(len(rows), np.int32) if hashed is None else np.where(rows < 0, 0, hashed[np.maximum(rows, 0)])


def _write_buckets(config: Config, cuts: tuple[int, int] | None, out: Path, table: pa.Table) -> pa.Table:
    frame = pl.DataFrame(table)
    buckets = sorted(frame["bucket"].unique().to_list()) if len(frame) else []
    rows = [json.dumps(_write_bucket(config, cuts, out, b, frame.filter(pl.col("bucket") == b))) for b in buckets]
    return pa.table({"stats": pa.array(rows, pa.string())})


def _write_bucket(
    config: Config, cuts: tuple[int, int] | None, out: Path, bucket: int, frame: pl.DataFrame
) -> dict[str, Any]:
    """Writes one bucket and returns what it adds to the manifest."""
    frame = frame.sort(["number", "row"])
    refused = frame.filter(pl.col("reason").is_not_null())
    rejected = refused.select(pl.lit("events").alias("source"), "file", "row", "raw", "reason")
    _parquet(out / "rejected" / f"part-{bucket:04d}.parquet", _table(rejected, REJECTED))
    kept = frame.filter(pl.col("reason").is_null()).sort(["user_id", "timestamp", "number", "row"])
    kept = kept.with_columns(split=_split(cuts))
    names = {"item_id": "item", "timestamp": "timestamp", "split": "split"}
    views = config.views_at("event")
    users = kept.group_by("user_id", maintain_order=True).agg(
        *[pl.col(ours).alias(theirs) for ours, theirs in names.items()], *[pl.col(f"view.{name}") for name in views]
    )
    spine = pa.schema(
        [
            ("user_id", pa.string()),
            ("item", pa.list_(pa.string())),
            ("timestamp", pa.list_(pa.int64())),
            ("split", pa.list_(pa.int8())),
        ]  # fmt: skip
    )
    part = f"bucket={bucket:04d}/part-0.parquet"
    _parquet(out / "events" / part, _table(users.select(spine.names), spine))
    for name, view in views.items():
        schema = pa.schema([("user_id", pa.string()), ("value", pa.list_(VALUE_TYPES[view.kind]))])
        _parquet(
            out / "views" / name / part, _table(users.select("user_id", pl.col(f"view.{name}").alias("value")), schema)
        )
    train = kept.filter(pl.col("split") == TRAIN)
    return {
        "bucket": bucket,
        "rows": len(frame),
        "kept": len(kept),
        "users": len(users),
        "reasons": dict(Counter(refused["reason"].to_list())),
        "splits": [int((kept["split"] == split).sum()) for split in (TRAIN, VALID, TEST)],
        "short_users": int((users["item"].list.len() < 3).sum()) if cuts is None else 0,
        "span": [kept["timestamp"].min(), kept["timestamp"].max()],
        "items": sorted(kept["item_id"].unique().to_list()),
        "train_items": sorted(train["item_id"].unique().to_list()),
        "fits": {name: _sums(train[f"view.{name}"], view) for name, view in views.items()},
        "missing": {name: int(kept[f"view.{name}"].is_null().sum()) for name in views},
        "unread": {
            name: int(frame[f"unread.{name}"].sum() or 0) for name, view in views.items() if view.kind == "number"
        },
    }


def _split(cuts: tuple[int, int] | None) -> pl.Expr:
    if cuts is not None:
        time_ = pl.col("timestamp")
        return pl.when(time_ >= cuts[1]).then(TEST).when(time_ >= cuts[0]).then(VALID).otherwise(TRAIN).cast(pl.Int8)
    back = pl.len().over("user_id") - 1 - pl.int_range(pl.len()).over("user_id")
    long = pl.len().over("user_id") >= 3
    return pl.when(long & (back == 0)).then(TEST).when(long & (back == 1)).then(VALID).otherwise(TRAIN).cast(pl.Int8)


def _cuts(config: Config) -> tuple[int, int] | None:
    """The temporal cuts in microseconds, or None for leave-one-out."""
    split = config.data.split
    if not isinstance(split, Temporal):
        return None
    found = []
    for key in ("valid_from", "test_from"):
        try:
            moment = datetime.fromisoformat(getattr(split, key))
        except ValueError:
            raise ConfigError(
                f"data.split.{key}: expected an ISO-8601 instant, found '{getattr(split, key)}'"
            ) from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        found.append(round(moment.timestamp()) * 1_000_000)
    if found[0] >= found[1]:
        raise ConfigError(
            f"data.split: expected valid_from before test_from, found {split.valid_from}, {split.test_from}"
        )
    return found[0], found[1]


# items and users


@dataclass(frozen=True)
class _Table:
    """The rows of items or users: one an id, and the rows that were refused."""

    frame: pl.DataFrame  # the id and "view.<name>", one row an id, in file order
    display: pl.Series | None
    rows: int
    refused: list[tuple[str, int, str, str]]  # file, row, raw, reason
    unread: dict[str, int]

    @staticmethod
    def read(config: Config, key: str, files: Sequence[str]) -> _Table:
        columns, source = Columns.of(config, key), getattr(config.data, key)
        id_name = "item_id" if key == "items" else "user_id"
        kept, refused, rows, seen = [], [], 0, set()
        unread: Counter[str] = Counter()
        for file in files:
            for chunk in raw.chunks(file, source, dict(columns.needed)):
                frame = read_ids(chunk.frame, [id_name])
                rows += len(frame) + len(chunk.bad)
                refused += [
                    (file, row, json.dumps({"text": text}, ensure_ascii=False), why) for row, text, why in chunk.bad
                ]
                reasons = []
                for value in frame[id_name].to_list():
                    reasons.append(
                        f"{id_name} is missing" if value is None else "duplicate id" if value in seen else None
                    )
                    seen.add(value)
                bad = [place for place, reason in enumerate(reasons) if reason]
                whole = chunk.whole(bad) if bad else []
                refused += [(file, chunk.rows[p], text, str(reasons[p])) for p, text in zip(bad, whole, strict=True)]
                good = frame.filter(pl.Series([reason is None for reason in reasons], dtype=pl.Boolean))
                values = {
                    f"view.{name}": read_value(good, view) for name, view in columns.views.items() if view.kind != "id"
                }
                for name, view in columns.views.items():
                    if isinstance(view, NumberView):
                        unread[name] += unreadable(good, view)
                if config.text_view and key == "items":
                    first = config.views[config.text_view].columns[0]  # type: ignore[union-attr]
                    values["display"] = shown(good, first)
                kept.append(pl.DataFrame({id_name: good[id_name], **values}))
        if not kept:
            raise DataError(f"data.{key}: 0 rows in {', '.join(files)}")
        frame = pl.concat(kept, how="vertical_relaxed")
        display = frame["display"] if "display" in frame.columns else None
        return _Table(frame, display, rows, refused, dict(unread))


def _items_and_users(
    config: Config, stats: Sequence[dict[str, Any]], tables: dict[str, _Table], out: Path
) -> dict[str, Any]:
    """Writes items/, users/ and fitted.json; the facts about them for the manifest."""
    views = config.views_at("item")
    trained = {item for one in stats for item in one["train_items"]}
    given = tables["items"].frame if "items" in tables else pl.DataFrame({"item_id": pl.Series([], dtype=pl.String)})
    known = set(given["item_id"].to_list())
    extra = pl.DataFrame({"item_id": pl.Series(sorted(trained - known), dtype=pl.String)})
    items = pl.concat([given, extra], how="diagonal")
    _parquet(out / "items" / "id.parquet", _table(items.select("item_id"), pa.schema([("item_id", pa.string())])))
    if "display" not in items.columns:
        items = items.with_columns(display=pl.lit(None, pl.String))
    _write_values(out / "items" / "display.parquet", items, "item_id", "display", pa.string())
    in_train = items.filter(pl.Series([item in trained for item in items["item_id"].to_list()], dtype=pl.Boolean))
    fitted: dict[str, dict] = {}
    for name, view in views.items():
        if view.kind != "id":
            _write_values(out / "items" / f"{name}.parquet", items, "item_id", f"view.{name}", VALUE_TYPES[view.kind])
            fitted |= _fit(name, view, [_sums(in_train[f"view.{name}"], view)])
    for name, view in config.views_at("event").items():
        fitted |= _fit(name, view, [one["fits"][name] for one in stats])
    if "users" in tables:
        users = tables["users"].frame
        active = _train_users(out) if config.views_at("user") else set()
        mask = pl.Series([user in active for user in users["user_id"].to_list()], dtype=pl.Boolean)
        for name, view in config.views_at("user").items():
            _write_values(out / "users" / f"{name}.parquet", users, "user_id", f"view.{name}", VALUE_TYPES[view.kind])
            fitted |= _fit(name, view, [_sums(users.filter(mask)[f"view.{name}"], view)])
    _write(out / "fitted.json", json.dumps(fitted, ensure_ascii=False, sort_keys=True, indent=1))
    logged = {item for one in stats for item in one["items"]}
    text = config.text_view
    return {
        "items": len(items),
        "items_without_text": int(items[f"view.{text}"].is_null().sum()) if text else None,
        "unknown_items": len(logged - known) if "items" in tables else 0,
        "vocabulary": {name: len(fit["values"]) for name, fit in fitted.items() if fit["kind"] == "category"},
    }


def _write_values(path: Path, frame: pl.DataFrame, id_name: str, column: str, kind: pa.DataType) -> None:
    schema = pa.schema([(id_name, pa.string()), ("value", kind)])
    _parquet(path, _table(frame.select(id_name, pl.col(column).alias("value")), schema))


def _train_users(out: Path) -> set[str]:
    found: set[str] = set()
    for file in sorted((out / "events").glob("*/*.parquet")):
        table = pl.from_arrow(pq.read_table(file, columns=["user_id", "split"]))
        assert isinstance(table, pl.DataFrame)
        found |= set(table.filter(pl.col("split").list.contains(TRAIN))["user_id"].to_list())
    return found


def _sums(values: pl.Series, view: Any) -> dict[str, Any]:
    """What can be added up over buckets: distinct categories, or count, mean and squared deviations of numbers."""
    if isinstance(view, CategoryView):
        return {"values": sorted(set(values.explode().drop_nulls().to_list()))}
    if isinstance(view, NumberView):
        there = values.drop_nulls().to_numpy()
        mean = float(there.mean()) if len(there) else 0.0
        return {"count": len(there), "mean": mean, "squares": float(((there - mean) ** 2).sum())}
    return {}


def _fit(name: str, view: Any, parts: Sequence[dict[str, Any]]) -> dict[str, dict]:
    if isinstance(view, CategoryView):
        return {name: {"kind": "category", "values": sorted({value for part in parts for value in part["values"]})}}
    if isinstance(view, NumberView):
        count, mean, squares = 0, 0.0, 0.0  # merged as in Chan et al. 1979: E[x^2] - E[x]^2 cancels for large values
        for part in (part for part in parts if part["count"]):
            total, delta = count + part["count"], part["mean"] - mean
            squares += part["squares"] + delta**2 * count * part["count"] / total
            mean, count = mean + delta * part["count"] / total, total
        deviation = (squares / count) ** 0.5 if count else 0.0
        return {name: {"kind": "number", "mean": mean, "std": deviation or 1.0, "count": count}}
    return {}


# what is said about it


def _count_reasons(stats: Sequence[dict[str, Any]], tables: dict[str, _Table]) -> dict[str, dict[str, int]]:
    events: Counter[str] = Counter()
    for one in stats:
        events.update(one["reasons"])
    counted = {"events": events, **{key: Counter(r[3] for r in table.refused) for key, table in tables.items()}}
    return {key: dict(sorted(reasons.items())) for key, reasons in counted.items()}


def _nothing_kept(files: Sequence[str], out: Path, rows: int) -> str:
    if not rows:
        return f"data.events: the log is empty: 0 rows in {', '.join(files)}"
    tables = [pq.read_table(file) for file in sorted((out / "rejected").glob("part-*.parquet"))]
    first = min((row for table in tables for row in table.to_pylist()), key=lambda row: (row["file"], row["row"]))
    return (
        f"data.events: all {rows} rows were rejected; the first is row {first['row']} of {first['file']}: "
        f"{first['reason']}, in {first['raw']}"
    )


def _rejected_tables(tables: dict[str, _Table]) -> pa.Table:
    rows = [(key, *refused) for key, table in sorted(tables.items()) for refused in table.refused]
    columns: list[Any] = list(zip(*rows, strict=True)) if rows else [[]] * len(REJECTED)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, REJECTED, strict=True)], schema=REJECTED)


def _manifest(
    config: Config,
    sources: dict[str, list[str]],
    stats: Sequence[dict[str, Any]],
    tables: dict[str, _Table],
    rejected: dict[str, dict[str, int]],
    facts: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    kept = {"events": sum(s["kept"] for s in stats)} | {key: len(table.frame) for key, table in tables.items()}
    rows = {"events": sum(s["rows"] for s in stats)} | {key: table.rows for key, table in tables.items()}
    spans = [s["span"] for s in stats if s["kept"]]
    span = [min(first for first, _ in spans), max(last for _, last in spans)]
    unread: Counter[str] = Counter()
    for part in [s["unread"] for s in stats] + [table.unread for table in tables.values()]:
        unread.update(part)
    tree = json.loads(config.model_dump_json(include={"data", "views"}))
    return {
        "schema_version": SCHEMA_VERSION,
        "config": tree,
        "sources": [_fingerprint(file) for files in sources.values() for file in files],
        "rows": {k: {"in": rows[k], "kept": kept[k], "rejected": sum(rejected[k].values())} for k in rows},
        "rejected": rejected,
        "users": sum(s["users"] for s in stats),
        "short_users": sum(s["short_users"] for s in stats),
        "events": dict(zip(("train", "valid", "test"), np.sum([s["splits"] for s in stats], 0).tolist(), strict=True)),
        "span": [datetime.fromtimestamp(t // 1_000_000, UTC).isoformat() for t in span],
        **facts,
        "missing_values": {name: sum(s["missing"][name] for s in stats) for name in config.views_at("event")},
        "unreadable_values": dict(unread),
        "buckets": config.data.buckets,
        "content_hash": _content_hash(out),
    }


def _fingerprint(file: str) -> dict[str, Any]:
    with open(file, "rb") as content:
        return {
            "file": file,
            "bytes": os.path.getsize(file),
            "sha256": hashlib.file_digest(content, "sha256").hexdigest(),
        }


def _content_hash(out: Path) -> str:
    """Of what training can read: the same for the same rows, however they were cut into files or shared out."""
    whole = hashlib.sha256()
    files = [f for part in ("events", "views", "items", "users") for f in (out / part).rglob("*.parquet")]
    for file in sorted([*files, out / "fitted.json"]):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.relative_to(out).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


def _summarise(manifest: dict[str, Any], target: Path, seconds: float, log: Callable[[str], None]) -> None:
    rows, events = manifest["rows"]["events"], manifest["events"]
    log(f"prepare: {rows['in']:,} rows in = {rows['kept']:,} kept + {rows['rejected']:,} rejected")
    for key, reasons in manifest["rejected"].items():
        for reason, count in reasons.items():
            log(f"prepare:   {count:,} {key} rejected: {reason}")
    log(
        f"prepare: {manifest['users']:,} users, {manifest['items']:,} items, "
        f"{events['train']:,} train / {events['valid']:,} valid / {events['test']:,} test events"
    )
    for count, what in (
        (manifest["short_users"], "users have fewer than 3 events: all of them train, nothing to test"),
        (manifest["items_without_text"], "items have no text: their text view is masked"),
        (manifest["unknown_items"], "items of the log are missing from the items file"),
        *(
            (count, f"values of view '{name}' are not numbers: masked")
            for name, count in manifest["unreadable_values"].items()
        ),
    ):
        if count:
            log(f"prepare: {count:,} {what}")
    log(f"prepare: wrote {target} in {seconds:.1f} s")


# files


def _table(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    return frame.select(schema.names).to_arrow().cast(schema).combine_chunks()


def _parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("prepare")
