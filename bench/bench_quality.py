"""The README's quality table: prepare, train and evaluate one configuration with several seeds, and their mean.

    python bench/bench_quality.py --config pipelines/configs/movielens-100k.yaml --seeds 0,1,2 [section.key=value ...]

Each seed is a run of its own, <name>-seed<n>; one that has metrics.json already is not trained again. With
train.init=pretrained each is pretrained first, and is <name>-pretrained-seed<n>.
"""

from __future__ import annotations

import argparse
import json
import statistics

from mvrec_core.config import load_config
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.train import train

COLUMNS = [(stage, metric) for stage in ("valid", "test") for metric in ("HR@10", "NDCG@10")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    given, overrides = parser.parse_known_args()
    whole = load_config(given.config, overrides)
    name = whole.name if whole.train.init == "scratch" else f"{whole.name}-{whole.train.init}"
    reports = []
    for seed in given.seeds:
        config = load_config(given.config, [*overrides, f"seed={seed}", f"name={name}-seed{seed}"])
        out = config.run_dir / "metrics.json"
        if not out.exists():
            prepare(config)
            if config.train.init == "pretrained":
                pretrain(config, overwrite=True)
            train(config, overwrite=True)
            evaluate(config.run_dir / "checkpoint", out)
        reports.append(json.loads(out.read_text(encoding="utf-8")))
    print(f"{name}, init: {whole.train.init}")
    print(f"{'':18}" + "".join(f"{stage + ' ' + metric:>16}" for stage, metric in COLUMNS))
    for seed, report in zip(given.seeds, reports, strict=True):
        print(f"{f'seed {seed}':18}" + "".join(f"{report[stage][metric]:16.4f}" for stage, metric in COLUMNS))
    for label, summary in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        print(f"{label:18}" + "".join(f"{summary([r[s][m] for r in reports]):16.4f}" for s, m in COLUMNS))


if __name__ == "__main__":
    main()
