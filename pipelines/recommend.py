"""The top-k lists of every stored user, as Parquet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from mvrec_core.recommender import Recommender


def recommend(directory: Path, stage: str, k: int, out: Path, log: Callable[[str], None] = print) -> int:
    """Writes user_id, rank, item_id, score; the rows written. stage: "valid", "test" or "live"."""
    recommender = Recommender.load(directory)
    table = recommender.lists(stage, k)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    pq.write_table(table, aside)
    aside.replace(out)
    log(f"recommend: wrote {table.num_rows:,} rows to {out}")
    return table.num_rows


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("recommend")
