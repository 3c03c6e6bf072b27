"""The README's quality table: prepare, train and evaluate one configuration with several seeds, beside the baselines.

    python bench/bench_quality.py --config pipelines/configs/movielens-100k.yaml --seeds 0,1,2 [section.key=value ...]

Each seed is a run of its own, <name>-seed<n>; one that has metrics.json already is not
trained again, whatever the overrides: remove runs/<name>-seed* first to measure anew. With
train.init=pretrained each is pretrained first, is <name>-pretrained-seed<n>, and stands
beside the same from scratch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from mvrec_core.config import Config
from mvrec_core.reading import load_config
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.train import train

COLUMNS = [(stage, metric) for stage in ("valid", "test") for metric in ("HR@10", "NDCG@10")]
BESIDES: dict[str, Callable[[dict[str, Any]], float]] = {
    "ECE, all pairs": lambda report: report["calibration"]["ece"],
    "ECE, top 10": lambda report: report["calibration"]["ece_top10"],
    "cold items HR@10": lambda report: report["segments"]["item/cold"].get("HR@10", 0.0),
}


def main() -> None:
    torch.set_num_threads(1)  # so that figures do not depend on the machine; training has train.threads
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    given, overrides = parser.parse_known_args()
    whole = load_config(given.config, overrides)
    name = whole.name if whole.train.init == "scratch" else f"{whole.name}-{whole.train.init}"
    reports, from_scratch = [], []
    for seed in given.seeds:
        config = load_config(given.config, [*overrides, f"seed={seed}", f"name={name}-seed{seed}"])
        beside = None
        if config.train.init == "pretrained":
            again = [*overrides, f"seed={seed}", f"name={whole.name}-seed{seed}", "train.init=scratch"]
            scratch = load_config(given.config, again)
            from_scratch.append(measured(scratch))
            beside = scratch.run_dir / "checkpoint"
        reports.append(measured(config, beside))
    print(f"{name}, init: {whole.train.init}, {reports[0]['users']:,} users, {reports[0]['protocol']}")
    print(f"{'':20}" + "".join(f"{stage + ' ' + metric:>16}" for stage, metric in COLUMNS))
    for seed, report in zip(given.seeds, reports, strict=True):
        print(line(f"seed {seed}", [report], mean))
    rows = {name: [report["baselines"][name] for report in reports] for name in reports[0]["baselines"]}
    if all(report["hybrid"] for report in reports):
        rows["hybrid"] = [report["hybrid"] for report in reports]
    if from_scratch:
        rows["from scratch"] = from_scratch
    for label, found in {**rows, "mvrec": reports}.items():
        print(line(label, found, mean))
        if len(reports) > 1:
            print(line("  deviation", found, statistics.stdev))
    for metric in ("HR@10", "NDCG@10"):
        if "test_at_unknown_time" in reports[0]:
            unknown = mean([report["test_at_unknown_time"][metric] for report in reports])
            print(f"{f'test {metric}, not told when the target happened':52}{unknown:8.4f}")
    for label, pick in BESIDES.items():
        print(f"{label:20}{mean([pick(report) for report in reports]):16.4f}")


def measured(config: Config, beside: Path | None = None) -> dict[str, Any]:
    """The run's metrics.json, made if it is not there."""
    out = config.run_dir / "metrics.json"
    if not out.exists():
        prepare(config)
        if config.train.init == "pretrained":
            pretrain(config, overwrite=True)
        train(config, overwrite=True)
        evaluate(config.run_dir / "checkpoint", out, beside=beside)
    return json.loads(out.read_text(encoding="utf-8"))


def line(label: str, rows: Sequence[dict[str, Any]], summary: Callable[[list[float]], float]) -> str:
    cells = (summary([row[stage][metric] for row in rows]) for stage, metric in COLUMNS)
    return f"{label:20}" + "".join(f"{cell:16.4f}" for cell in cells)


if __name__ == "__main__":
    main()
