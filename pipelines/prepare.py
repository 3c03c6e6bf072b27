"""Raw logs -> prepared data: per-view Parquet by bucket, items, users, what was rejected, a manifest, a report.

    read and check (a task a few files) -> spool -> clean, split and write (a task a bucket) -> items, users -> manifest

Every row takes this one way: a row that is not taken ends in rejected/ with its reason. Ray Data runs the tasks. Rows
go from one task to another through the spool on disk, so memory is bounded by a bucket.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mvrec_core import cleaning
from mvrec_core.config import Config
from mvrec_core.data import Temporal
from mvrec_core.errors import ConfigError, DataError, nearest
from mvrec_core.schema import Columns, instant
from mvrec_core.views import VectorView
from pipelines import buckets, catalogue, files, locations, manifests, prepare_report, raw, spool, tables, vectors
from pipelines.buckets import Made
from pipelines.cluster import connect, cores
from pipelines.manifests import State
from pipelines.spool import Filled
from pipelines.spread import spread
from pipelines.tables import Table

Log = Callable[[str], None]
Events = list[tuple[int, str]]  # source and file


def prepare(
    config: Config, log: Log = print, append: Sequence[str] = (), only_view: str | None = None
) -> dict[str, Any]:
    """Writes <run>/prepared whole or not at all, and returns its manifest.

    append:    paths of new event files; only the buckets that they touch are made anew
    only_view: the one view to add or to make anew; the files of the others stay as they are

    Raises ConfigError, DataError, and ResourceError where the disk is full.
    """
    began = time.perf_counter()
    _check_instants(config)
    target = config.run_dir.absolute() / "prepared"
    with files.aside_of(target) as aside, files.room(aside):
        if append:
            state, given = _append(config, append, target, aside, log)
        elif only_view is not None:
            state, given = _only(config, only_view, target, aside, log)
        else:
            state, given = _whole(config, aside, log)
        state = replace(state, files=state.files | {name: list(file) for name, file in given.files.items()})
        facts = catalogue.write(config, state.made, given.tables, given.vectors, aside, only_view)
        shutil.rmtree(aside / buckets.CORE, ignore_errors=True)
        state.save(aside)
        manifest = manifests.build(config, state, given.tables, given.names, facts, aside, time.perf_counter() - began)
        files.write_text(aside / "report.html", prepare_report.html(manifest))
        files.write_text(aside / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
        files.publish(aside, target)
    for line in prepare_report.lines(manifest):
        log(line)
    log(f"prepare: wrote {target} in {time.perf_counter() - began:.1f} s")
    return manifest


# three ways to the buckets


def _whole(config: Config, out: Path, log: Log) -> tuple[State, Given]:
    events = _event_files(config)
    given = Given.read(config)
    given.write_rejected(out)
    connect()
    filled = _fill(config, events, 0, 0, out, log)
    count = spool.choose_buckets(config, sum(one.rows for one in filled))
    made = _make(config, range(count), count, out, log)
    state = State.of(events, filled, made)
    _check_kept(state, out)
    _write_late(config, state, range(count), out, log)
    return state, given


def _append(config: Config, paths: Sequence[str], target: Path, out: Path, log: Log) -> tuple[State, Given]:
    state = State.load(target)
    _check_config(config, manifests.load(target), None)
    events = _new_files(config, paths, state)
    given = Given.read(config)
    given.write_rejected(out)
    for part in [*spool.parts(target), *(target / "rejected").glob("part-*.parquet")]:
        files.link(part, out / part.relative_to(target))
    before = len(spool.parts(out))
    connect()
    filled = _fill(config, events, len(state.events), state.generation + 1, out, log)
    count = spool.choose_buckets(config, state.rows + sum(one.rows for one in filled))
    new = sum((spool.rows_in(part, count) for part in spool.parts(out)[before:]), np.zeros(count, np.int64))
    anew = count != state.buckets or config.data.clean.core is not None  # then every bucket may change
    touched = [bucket for bucket in range(count) if anew or new[bucket]]
    for bucket in set(range(count)) - set(touched):
        for name in [*state.made[bucket].files, *buckets.notes(bucket)]:
            files.link(target / name, out / name)
    log(f"prepare: {len(touched)} of {count} buckets are touched")
    made = {bucket: one for bucket, one in enumerate(state.made) if bucket not in touched}
    made |= {one.bucket: one for one in _make(config, touched, count, out, log)}
    then = state.then(State.of(events, filled, [made[bucket] for bucket in range(count)]))
    _keep_late(state, touched, target, out)
    _write_late(config, then, touched, out, log)
    return then, given


def _only(config: Config, name: str, target: Path, out: Path, log: Log) -> tuple[State, Given]:
    if name not in config.views:
        raise ConfigError(f"views has no '{name}'; {nearest(name, config.views)}")
    state = State.load(target)
    _check_config(config, manifests.load(target), name)
    given = Given.read(config)
    own = given.names.get(f"views.{name}", ())
    _check_unchanged(state, {file: found for file, found in given.files.items() if file not in own})
    event_level = config.views[name].level == "event"
    for path in (path for path in target.rglob("*") if path.is_file()):
        part = path.relative_to(target)
        if not (_is_of(part, name) or (event_level and part.match("spool/part-*"))):
            files.link(path, out / part)
    if not event_level:
        made = [
            replace(one, files={f: d for f, d in one.files.items() if not _is_of(Path(f), name)}) for one in state.made
        ]
        return replace(state, made=made), given
    connect()
    scratch = out / "again"
    filled = _fill(config, state.events, 0, 0, scratch, log)
    read = State.of(state.events, filled, [])
    _check_unchanged(state, read.files)
    for part in spool.parts(scratch):
        part.rename(out / "spool" / part.name)
    shutil.rmtree(scratch)  # what it rejected is in rejected/ already
    made = _make(config, range(state.buckets), state.buckets, out, log, only=name)
    merged = [
        replace(one, files=_without(old.files, name) | one.files) for old, one in zip(state.made, made, strict=True)
    ]
    return replace(state, unread=read.unread, made=merged), given


def _is_of(part: Path, view: str) -> bool:
    """Whether a file of prepared data is one of the view's."""
    return f"views/{view}/" in part.as_posix() or part.as_posix() in (f"items/{view}.parquet", f"users/{view}.parquet")


def _without(digests: Mapping[str, str], view: str) -> dict[str, str]:
    return {file: digest for file, digest in digests.items() if not _is_of(Path(file), view)}


# raw files


def _event_files(config: Config) -> Events:
    found = []
    for number, source in enumerate(config.data.events):
        key = _key(config, number)
        found += [(number, file) for file in locations.find(source, key)]
    _check_columns(config, found)
    return found


def _new_files(config: Config, paths: Sequence[str], state: State) -> Events:
    """The files of an increment, each with the source whose paths it matches, or the only source."""
    sources = config.data.events
    there = {file for _, file in state.events}
    found = []
    for file in locations.find(sources[0].model_copy(update={"path": tuple(paths)}), "append"):
        if file in there:
            raise DataError(f"append: '{file}' is in the prepared data already")
        fitting = [n for n, source in enumerate(sources) if any(_fits(file, path) for path in source.paths)]
        if len(sources) > 1 and len(fitting) != 1:
            raise DataError(f"append: '{file}' matches the paths of {len(fitting)} of data.events, expected one")
        found.append((fitting[0] if len(sources) > 1 else 0, file))
    _check_columns(config, found)
    return found


def _fits(file: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(file, pattern) or fnmatch.fnmatchcase(file, pattern.rstrip("/") + "/*")


def _check_columns(config: Config, events: Events) -> None:
    for number, file in events:
        raw.check_columns(file, config.data.events[number], Columns.of(config, "events").names, _key(config, number))


def _key(config: Config, number: int) -> str:
    return "data.events" if len(config.data.events) == 1 else f"data.events.{number}"


@dataclass(frozen=True)
class Given:
    """What belongs to items and users: the rows of their tables, the vectors of views that have files of their own, and
    the bytes and digest of all these files."""

    tables: dict[str, Table]
    vectors: dict[str, pl.DataFrame]
    files: dict[str, tuple[int, str]]
    names: dict[str, list[str]]

    @staticmethod
    def read(config: Config) -> Given:
        names = {}
        for key in ("items", "users"):
            source = getattr(config.data, key)
            if source is not None:
                names[key] = locations.find(source, f"data.{key}")
                for file in names[key]:
                    raw.check_columns(file, source, Columns.of(config, key).names, f"data.{key}")
        read = {key: tables.read(config, key, found) for key, found in names.items()}  # type: ignore[arg-type]
        own = {}
        for name, view in config.views_at("item").items():
            if isinstance(view, VectorView) and view.path is not None:
                own[name], names[f"views.{name}"] = vectors.read(name, view)
        prints = {file: locations.fingerprint(file) for found in names.values() for file in found}
        return Given(read, own, prints, names)

    def write_rejected(self, out: Path) -> None:
        for key, table in self.tables.items():
            rejected = table.rejected.to_arrow().cast(spool.REJECTED)
            files.write_parquet(out / "rejected" / f"{key}.parquet", rejected)


# tasks on Ray


def _fill(config: Config, events: Events, first: int, generation: int, out: Path, log: Log) -> list[Filled]:
    """Reads the event files, numbered from `first`, into the spool; what each task read, in order."""
    found = raw.pieces([config.data.events[source] for source, _ in events], [[file] for _, file in events])
    pieces = [replace(piece, source=events[piece.number][0], number=first + piece.number) for piece in found]
    jobs = spool.tasks(pieces, cores())
    log(f"prepare: reading {len(events)} event file(s) in {len(jobs)} task(s)")

    def work(job: int) -> str:
        return json.dumps(asdict(spool.fill(config, jobs[job], job, f"{generation:04d}", out)), ensure_ascii=False)

    done: list[Filled] = []
    for answer in spread(work, range(len(jobs))):
        done.append(Filled(**json.loads(answer)))
        rows = sum(one.rows for one in done)
        _progress(log, len(done), len(jobs), f"files read, {rows:,} rows")
    return sorted(done, key=lambda one: one.task)


def _make(
    config: Config, chosen: Sequence[int], count: int, out: Path, log: Log, only: str | None = None
) -> list[Made]:
    """Makes the chosen ones of so many buckets; what each adds to the manifest, in order."""
    parts = spool.parts(out)
    core = config.data.clean.core
    if core is not None:
        for place, _ in enumerate(spread(lambda b: buckets.counted(config, parts, b, count, out), range(count))):
            _progress(log, place + 1, count, "buckets counted for the core")
        buckets.write_core(core, out)

    def work(bucket: int) -> str:
        return json.dumps(asdict(buckets.make(config, parts, bucket, count, out, only)), ensure_ascii=False)

    done: list[Made] = []
    for answer in spread(work, chosen):
        done.append(Made(**json.loads(answer)))
        kept = sum(one.kept for one in done)
        _progress(log, len(done), len(chosen), f"buckets written, {kept:,} events")
    return sorted(done, key=lambda one: one.bucket)


def _write_late(config: Config, state: State, touched: Sequence[int], out: Path, log: Log) -> None:
    """Writes the rows that the touched buckets left out to rejected/, a task a raw file, as the raw file has them."""
    notes = [out / "spool" / "late" / f"{bucket:04d}.parquet" for bucket in touched]
    if not notes or not (numbers := _numbers(notes)):
        return

    def work(number: int) -> str:
        source, file = state.events[number]
        rows = pl.scan_parquet(notes).filter(pl.col("number") == number).sort("row").collect()
        try:
            whole = raw.take(file, config.data.events[source], rows["row"].to_list())
        except DataError:  # the raw file is gone since: what the spool holds of the row
            whole = rows["held"].to_list()
        names = [["events"] * len(rows), [file] * len(rows)]
        table = pa.table([*names, rows["row"].to_arrow(), pa.array(whole, pa.string()), rows["reason"]], spool.REJECTED)
        files.write_parquet(out / "rejected" / f"late-{state.generation:04d}-{number:05d}.parquet", table)
        return ""

    for place, _ in enumerate(spread(work, numbers)):
        _progress(log, place + 1, len(numbers), "files searched for the rows that cleaning left out")


def _numbers(notes: list[Path]) -> list[int]:
    return pl.scan_parquet(notes).select(pl.col("number").unique().sort()).collect()["number"].to_list()


def _keep_late(state: State, touched: Sequence[int], target: Path, out: Path) -> None:
    """Links what earlier runs left out, without the rows of the touched buckets, which are left out anew."""
    old = sorted((target / "rejected").glob("late-*.parquet"))
    notes = [target / "spool" / "late" / f"{bucket:04d}.parquet" for bucket in touched if bucket < state.buckets]
    everything = len(touched) >= state.buckets
    if not old or everything:
        return
    names = dict(enumerate(file for _, file in state.events))
    again = pl.read_parquet(notes).select(
        file=pl.col("number").replace_strict(names, return_dtype=pl.String), row="row"
    )
    for path in old:
        rows = pl.read_parquet(path)
        left = rows.join(again, on=["file", "row"], how="anti", maintain_order="left")
        if len(left) == len(rows):
            files.link(path, out / "rejected" / path.name)
        elif len(left):
            files.write_parquet(out / "rejected" / path.name, left.to_arrow().cast(spool.REJECTED))


def _progress(log: Log, done: int, of: int, what: str) -> None:
    """A line for each twentieth of the work."""
    if done == of or done * 20 // of > (done - 1) * 20 // of:
        log(f"prepare: {done}/{of} {what}")


# checks


def _check_instants(config: Config) -> None:
    for key, moment in (("since", config.data.clean.since), ("until", config.data.clean.until)):
        if moment is not None:
            instant(moment, f"data.clean.{key}")
    if isinstance(config.data.split, Temporal):
        cleaning.cuts(config.data.split)


def _check_kept(state: State, out: Path) -> None:
    if any(one.kept for one in state.made):
        return
    names = ", ".join(file for _, file in state.events)
    if not state.rows:
        raise DataError(f"data.events: the log is empty: 0 rows in {names}")
    early = sorted((out / "rejected").glob("part-*.parquet"))
    if not early:
        reasons = " and ".join(sorted({reason for one in state.made for reason in one.reasons}))
        raise DataError(f"data.events: all {state.rows} rows were left out by data.clean: {reasons}")
    first = pl.concat([pl.read_parquet(file) for file in early]).sort("file", "row").row(0, named=True)
    raise DataError(
        f"data.events: all {state.rows} rows were rejected; the first is row {first['row']} of {first['file']}: "
        f"{first['reason']}, in {first['raw']}"
    )


def _check_config(config: Config, manifest: Mapping[str, Any], name: str | None) -> None:
    """Raises ConfigError where prepared data was made in another way: an increment changes the event paths, --only-view
    the view `name`; nothing else may differ."""
    before, now = manifest["config"], json.loads(config.model_dump_json(include={"data", "views"}))
    for tree in (before, now):
        if name is None:
            for source in tree["data"]["events"]:
                source.pop("path")
        else:
            tree["views"].pop(name, None)
    for section in ("data", "views"):
        for key in sorted({*before[section], *now[section]}):
            if before[section].get(key) != now[section].get(key):
                raise ConfigError(f"{section}.{key}: differs from the prepared data's; run 'mvrec prepare' as a whole")


def _check_unchanged(state: State, found: Mapping[str, Any]) -> None:
    for file, fingerprint in found.items():
        if list(fingerprint) != state.files.get(file):
            raise DataError(f"{file}: has changed since the data was prepared; run 'mvrec prepare' as a whole")


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("prepare")
