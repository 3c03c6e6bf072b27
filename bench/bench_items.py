"""Training on more and more items: what a worker, `prepare` and `evaluate` hold in memory, and what a step takes.

    python bench/bench_items.py --items 300_000,1_000_000,3_000_000,10_000_000 --dim 32

An id view and a category view, no text, `sampled_softmax`, one epoch in fp32 on one thread. The log: EVENTS of USERS,
Zipf items; the last EACH events are test, and as many before them validation, few since each of their users has the
whole catalogue ranked. `prepare` and `evaluate` run as commands, with all of their processes counted; `train` is what
a worker does, in a process without Ray: epoch, validation, state, calibration, reference, checkpoint.

B an item: of the peak of `train`, without what it is with 1,000 items; peak / table: the same over dim x 4 bytes
step: seconds of CPU of a training step, over those with the fewest items
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from bench_prepare import ROOT, measured
from bench_train import peak_kib
from synthetic_log import SEED, START, YEAR

from mvrec_core import checkpoint, ranking, training
from mvrec_core.reading import load_config
from mvrec_core.reference import reference
from mvrec_core.resume import States
from mvrec_core.workers import Workers
from pipelines import datasets

EVENTS, USERS, EACH, CATEGORIES = 100_000, 4_000, 8, 1_000
NOTHING = 1_000  # items of the run that the others are compared with


def write(items: int, dim: int, root: Path) -> Path:
    """The log, the catalogue and the configuration of a run, whose path it returns."""
    import polars as pl

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    draw = np.random.default_rng(SEED)
    popularity = np.cumsum(1 / np.arange(1, items + 1))
    item = np.searchsorted(popularity, draw.random(EVENTS) * popularity[-1])
    when = START + np.arange(EVENTS) * (YEAR // EVENTS)

    def ids(letter: str, numbers: np.ndarray) -> pl.Series:
        return pl.select(pl.lit(letter) + pl.lit(pl.Series(numbers)).cast(pl.String).str.zfill(8)).to_series()

    log = {"user_id": ids("u", draw.integers(0, USERS, EVENTS)), "item_id": ids("i", item), "timestamp": when}
    pl.DataFrame(log).write_parquet(root / "events.parquet")
    catalogue = {"item_id": ids("i", np.arange(items)), "category": ids("c", draw.integers(0, CATEGORIES, items))}
    pl.DataFrame(catalogue).write_parquet(root / "items.parquet")
    valid, test = (str(np.datetime64(int(when[-n * EACH]), "s")) for n in (2, 1))
    tree = {
        "name": "run",
        "runs": str(root),
        "data": {
            "events": {"path": str(root / "events.parquet")},
            "items": {"path": str(root / "items.parquet")},
            "split": {"kind": "temporal", "valid_from": valid, "test_from": test},
        },
        "views": {"id": {"kind": "id"}, "category": {"kind": "category", "level": "item", "column": "category"}},
        "model": {"dim": dim, "blocks": 1, "heads": 1, "max_len": 50},
        "train": {"epochs": 1, "batch_size": 512, "loss": "sampled_softmax", "precision": "fp32", "threads": 1},
        "evaluate": {"baselines": [], "hybrid": []},
    }
    (root / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return root / "config.yaml"


def trains(path: Path) -> None:
    """What a worker does, and its figures as a line of JSON."""
    config = load_config(path, [])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data, shards = datasets.training(config)
    model = checkpoint.new_model(config, data, shards)
    began: list[float] = []
    model.register_forward_pre_hook(lambda *_: began.append(time.process_time()))
    states = States(config.run_dir / "resume", "bench")
    for _ in training.fit(model, shards, config, Workers(), states=states):  # one, and what it learns with is kept
        training.calibrate(model, shards, config, Workers())
        vectors, seen = ranking.catalogue(model)[1], reference(model, shards, config)
        checkpoint.save(config.run_dir / "checkpoint", model, data, vectors, {}, datasets.users(config), seen)
    print(json.dumps({"peak": peak_kib() * 1024, "step_s": float(np.median(np.diff(began)))}))


def run(items: int, dim: int, root: Path) -> dict[str, float]:
    """Of one size: peaks in bytes, and seconds of a step."""
    path = write(items, dim, root)
    command = [sys.executable, "-m", "pipelines.cli"]
    _, prepare_mb = measured([*command, "prepare", "-c", str(path)])
    told = subprocess.run([sys.executable, __file__, "--trains", path], capture_output=True, text=True, cwd=ROOT)
    if told.returncode:
        raise SystemExit(told.stderr)
    _, evaluate_mb = measured([*command, "evaluate", "-c", str(path)])
    shutil.rmtree(root)
    peaks = {"prepare": prepare_mb * 1e6, "evaluate": evaluate_mb * 1e6}
    return peaks | json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--items", default="300_000,1_000_000", type=lambda text: sorted(int(size) for size in text.split(","))
    )
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "bench-items", help="of the logs and the runs")
    parser.add_argument("--trains", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trains:
        trains(given.trains)
        return
    root = given.dir.absolute()
    empty, first = run(NOTHING, given.dim, root), None
    print(f"{'items':>12}{'prepare GB':>12}{'train GB':>10}{'evaluate GB':>13}{'B an item':>11}{'peak / table':>14}"
          f"{'step':>7}")  # fmt: skip
    for items in given.items:
        found = run(items, given.dim, root)
        first = first or found
        more = (found["peak"] - empty["peak"]) / items
        print(f"{items:12,}{found['prepare'] / 1e9:12.2f}{found['peak'] / 1e9:10.2f}{found['evaluate'] / 1e9:13.2f}"
              f"{more:11.0f}{more / (4 * given.dim):14.1f}{found['step_s'] / first['step_s']:7.1f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
