"""The log of bench_prepare.py. Imports are inside functions: a contestant's process should hold only what it uses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

SEED = 4
SLICE = 1_000_000  # events made at a time
START, YEAR = 1_700_000_000, 365 * 86_400  # seconds


def slices(events: int) -> Iterator[Any]:
    """The log as tables of SLICE rows: user_id, item_id, timestamp (s), event, price; the same for every call."""
    import numpy as np
    import polars as pl

    users, items = max(1, events // 20), min(200_000, max(10, events // 100))
    draw = np.random.default_rng(SEED)
    popularity = np.cumsum(1 / np.arange(1, items + 1))
    of_rank = draw.permutation(items)
    prices = np.round(draw.lognormal(3, 1, items), 2)
    user_ids = pl.select(pl.lit("u") + pl.int_range(users).cast(pl.String).str.zfill(8)).to_series()
    item_ids = pl.select(pl.lit("i") + pl.int_range(items).cast(pl.String).str.zfill(7)).to_series()
    kinds = pl.Series(["view", "cart", "buy"])
    for number, first in enumerate(range(0, events, SLICE)):
        draw, rows = np.random.default_rng([SEED, number]), min(SLICE, events - first)
        user = (users * draw.random(rows) ** 1.5).astype(np.int64)
        late = draw.normal(0, 600, rows)
        when = START + (np.arange(first, first + rows) * (YEAR / events) + late).astype(np.int64)
        when = when.clip(START, START + YEAR - 1)
        twice = np.flatnonzero(draw.random(rows) < 0.02)  # a second event in the same second: ties to keep in order
        user[twice], when[twice] = user[twice - 1], when[twice - 1]
        item = of_rank[np.searchsorted(popularity, draw.random(rows) * popularity[-1])]
        frame = pl.DataFrame(
            {
                "user_id": user_ids[user],
                "item_id": item_ids[item],
                "timestamp": when,
                "event": kinds[draw.choice(3, rows, p=[0.9, 0.07, 0.03])],
                "price": prices[item],
            }
        )
        fault, unpriced = pl.Series(draw.random(rows) * 4000), pl.Series(draw.random(rows) < 0.02)
        yield frame.with_columns(
            user_id=frame["user_id"].set(fault < 1, None),
            item_id=frame["item_id"].set((fault >= 1) & (fault < 2), None),
            timestamp=frame["timestamp"].set((fault >= 2) & (fault < 3), None).set((fault >= 3) & (fault < 4), 10**15),
            price=frame["price"].set(unpriced, None),
        ).to_arrow()


def write_log(root: Path, events: int, files: int) -> Path:
    """The folder of the log's Parquet files, made if it is not there."""
    import pyarrow.parquet as pq

    folder = root / f"log-{events}-{files}"
    if folder.exists():
        return folder
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rest, stream = None, slices(events)
    for number, (start, stop) in enumerate(pairwise(events * n // files for n in range(files + 1))):
        writer, missing = None, stop - start
        while missing:
            table = rest if rest is not None and rest.num_rows else next(stream)
            part, rest = table.slice(0, missing), table.slice(missing)
            writer = writer or pq.ParquetWriter(aside / f"events-{number:04d}.parquet", part.schema, compression="zstd")
            writer.write_table(part)
            missing -= part.num_rows
        if writer:
            writer.close()
    aside.rename(folder)
    return folder


def write_csv(root: Path, events: int) -> Path:
    import pyarrow.csv as csv

    path = root / f"log-{events}.csv"
    if not path.exists():
        stream = slices(events)
        first = next(stream)
        with csv.CSVWriter(path.with_suffix(".tmp"), first.schema) as writer:
            writer.write_table(first)
            for table in stream:
                writer.write_table(table)
        path.with_suffix(".tmp").rename(path)
    return path
