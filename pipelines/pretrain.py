"""Data-parallel pretraining on Ray Train: every worker runs mvrec_core.pretraining on its share of each batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvrec_core import checkpoint, pretraining
from mvrec_core.config import Config
from mvrec_core.errors import CheckpointError
from pipelines import datasets
from pipelines.train import join, on_workers, progress


def pretrain(config: Config, overwrite: bool = False, log: Callable[[str], None] = print) -> Path:
    """Pretrains on the train events of <run>/prepared and publishes <run>/pretrained, which it returns.

    Raises CheckpointError where the run is pretrained already, ResourceError where the cluster is too small.
    """
    target = config.run_dir / "pretrained"
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target}: run '{config.name}' is pretrained already; --overwrite to pretrain anew")
    pretraining.check(config)
    data = datasets.load(config)
    checkpoint.new_model(config, data, data.shards(config))  # what is wrong with data or model shows here, at once
    return on_workers("pretrain", _worker, config, target, log)


def _worker(settings: dict[str, Any]) -> None:
    """Runs on each worker; rank 0 reports the directory at the end."""
    import ray.train

    config, workers = join(settings)
    leads = workers.rank == 0
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "pretrained"
        for epoch in pretraining.pretrain(config, datasets.load(config), workers, directory):
            if leads:
                _say(progress(config.run_dir, "pretrain"), epoch)
            if epoch.last:  # every rank reports equally often: report is a barrier
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(str(directory)) if leads else None)


def _say(path: Path, epoch: pretraining.Epoch) -> None:
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in epoch.losses.items())
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{epoch.phase} epoch {epoch.number:3d}/{epoch.of}  {losses}  {epoch.seconds:.1f} s\n")


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("pretrain")
