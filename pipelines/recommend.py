"""The top-k lists of every stored user, as Parquet: a block of users at a time, on all cores of the cluster."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch

from mvrec_core import sealed
from mvrec_core.errors import MVRecError, RequestError
from mvrec_core.places import is_uri
from mvrec_core.reading import parse_config
from mvrec_core.recommender import Recommender
from mvrec_core.releases import local
from pipelines.cluster import connect, cores
from pipelines.files import write_parquet, write_text

USERS = 10_000  # of a block, about


@dataclass(frozen=True)
class Lists:
    """What is asked for: the lists of all users, `block` of them a part file in `parts`, as of `now` microseconds."""

    checkpoint: str
    stage: str  # "valid", "test" or "live"
    k: int
    parts: str
    block: int
    now: int | None

    def path(self, number: int) -> Path:
        return Path(self.parts) / f"part-{number:05d}.parquet"


def recommend(
    checkpoint: str | Path,
    stage: str,
    k: int,
    out: Path,
    log: Callable[[str], None] = print,
    users: int = USERS,
    now: int | Literal["clock"] | None = None,
) -> int:
    """Writes user_id, rank, item_id, score; the rows written. checkpoint: a directory, or a URI of an object store, of
    which each node has a copy of its own; stage: "valid", "test" or "live"; then `now` is when the
    lists will be read, in microseconds, "clock" for when the run began, None where that is not known.

    The lists are those of `Recommender.lists`, whole batches of it a block. Blocks stand in <out>.parts until all are
    there, so a run that was stopped goes on with those that are missing. Raises CheckpointError, RequestError.
    """
    directory = local(checkpoint)
    version = sealed.verify(directory)["model_version"]
    config = parse_config(json.loads((directory / "config.json").read_text(encoding="utf-8")), str(directory))
    batch = config.evaluate.batch_size
    parts = out.absolute().with_name(f"{out.name}.parts")
    block = batch * max(1, users // batch)
    began = _go_on(parts, {"model_version": version, "stage": stage, "k": k, "block": block, "now": now}, log)
    source = str(checkpoint) if is_uri(str(checkpoint)) else str(directory.absolute())
    lists = Lists(source, stage, k, str(parts), block, began if now == "clock" else now)
    blocks = range(-(-pq.read_metadata(directory / "users.parquet").num_rows // lists.block))
    missing = [number for number in blocks if not lists.path(number).exists()]
    try:
        for done, _ in enumerate(_made(lists, missing), start=1):
            log(f"recommend: {done}/{len(missing)} blocks of {lists.block:,} users")
    except RequestError:  # there is nothing to go on with
        shutil.rmtree(parts)
        raise
    rows = _joined([lists.path(number) for number in blocks], out)
    shutil.rmtree(parts)
    log(f"recommend: wrote {rows:,} rows to {out}")
    return rows


def _go_on(parts: Path, of: dict[str, Any], log: Callable[[str], None]) -> int:
    """Keeps the part files of the same lists, and of no others; when these were begun, in microseconds."""
    note, began = parts / "of.json", time.time_ns() // 1000
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before.get("of") == of:
            log(f"recommend: going on from {len(list(parts.glob('part-*.parquet')))} blocks in {parts}")
            return before["began"]
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    write_text(note, json.dumps({"of": of, "began": began}))
    return began


def _made(lists: Lists, missing: Sequence[int]) -> Iterator[int]:
    """Makes part files on as many actors as there are cores; the number of each, as they end. A single one is made
    here: Ray takes longer to start. Raises MVRecError."""
    if len(missing) < 2:
        yield from (Lister(lists).write(number) for number in missing)
        return
    connect()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told in our words
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    blocks = ray.data.from_items([{"block": number} for number in missing], override_num_blocks=len(missing))
    actors = (1, min(cores(), len(missing)))
    made = blocks.map_batches(Lister, fn_constructor_args=(lists, 1), batch_size=1, num_cpus=1, concurrency=actors)
    for row in made.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield row["block"]


class Lister:
    """A Recommender that writes part files. threads: of torch; None leaves them as they are."""

    def __init__(self, lists: Lists, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.lists = lists
        self.recommender = Recommender.load(lists.checkpoint)

    def write(self, number: int) -> int:
        users = slice(number * self.lists.block, (number + 1) * self.lists.block)
        lists = self.recommender.stored.lists(self.lists.stage, self.lists.k, users, self.lists.now)
        write_parquet(self.lists.path(number), lists)
        return number

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        try:
            return {"block": [self.write(int(number)) for number in batch["block"]], "error": [b""]}
        except MVRecError as mistake:  # a user's, so no reason to try again or to log a traceback
            return {"block": [-1], "error": [pickle.dumps(mistake)]}


def _joined(parts: Sequence[Path], out: Path) -> int:
    """Writes the rows of all parts as one file, which appears whole; how many there are."""
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    rows = 0
    with pq.ParquetWriter(aside, pq.read_schema(parts[0])) as writer:
        for part in parts:
            table = pq.read_table(part)
            writer.write_table(table)
            rows += table.num_rows
    aside.replace(out)
    return rows


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("recommend")
