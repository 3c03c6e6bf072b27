"""A training on two nodes of this machine, one of which dies and is replaced: python two_nodes.py ENCODER LOGS FOLDER

Prints as JSON whether the weights have the bits of a training in which no node died, and the lines of the log.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
import tiny
from ray.cluster_utils import Cluster

from mvrec_core.config import Config
from mvrec_core.errors import ResourceError
from pipelines.cluster import connect
from pipelines.prepare import prepare
from pipelines.train import train


def run(config: Config, name: str) -> Config:
    folder = Path(config.runs) / name
    folder.mkdir()
    (folder / "prepared").symlink_to((config.run_dir / "prepared").absolute())
    return config.model_copy(update={"name": name})


def weights(config: Config) -> bytes:
    return (config.run_dir / "checkpoint" / "model.safetensors").read_bytes()


def too_many(config: Config) -> str:
    more = config.model_copy(update={"train": config.train.model_copy(update={"workers": 5})})
    try:
        train(more, log=lambda line: None)
    except ResourceError as error:
        return str(error)
    return "nothing was said"


def main(encoder: str, logs: str, folder: str) -> None:
    paths = [f"data.{name}.path={logs}/{name}.csv" for name in ("events", "items", "users")]
    few = ["train.epochs=60", "train.patience=60", "train.workers=2", "train.save_steps=5"]
    config = tiny.config(Path(encoder), *paths, *few, f"runs={folder}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        os.environ["RAY_ADDRESS"] = cluster.address
        connect(min_cpus=2)
        prepare(config, log=lambda line: None)
        refused = too_many(run(config, "too-many"))
        alone, hit = run(config, "alone"), run(config, "hit")
        train(alone, log=lambda line: None)
        lines: list[str] = []
        job = threading.Thread(target=train, args=(hit,), kwargs={"log": lines.append})
        job.start()
        while job.is_alive() and len(lines) < 8:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        job.join()
        print(json.dumps({"equal": weights(hit) == weights(alone), "refused": refused, "lines": lines}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
