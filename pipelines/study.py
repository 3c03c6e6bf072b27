"""The trials of a study, kept in <runs>/<name>-tune/tune.json from the moment each one begins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvrec_core.config import Config, LogUniformSpace, Space, TuneConfig, UniformSpace, WholeSpace
from mvrec_core.errors import ConfigError
from mvrec_core.reading import check_value
from mvrec_core.training import CHOSEN_BY
from pipelines import files

BETWEEN = 0.6180339887  # of the way from low to high: no round number, so that a whole one is told from any other
FREE = (("tune", "trials"), ("tune", "at_once"), ("train", "trackers"))  # what may change while a study goes on


@dataclass
class Trial:
    """One setting of the study, trained as the run <runs>/<name>-tune/<trial>."""

    name: str
    values: dict[str, Any]
    status: Literal["running", "finished", "stopped", "failed"] = "running"
    score: float | None = None  # its best validation NDCG@10
    epochs: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass
class Study:
    path: Path
    config: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    interrupted: list[Trial] = field(default_factory=list)  # of the trials, those that begin again

    @staticmethod
    def open(config: Config) -> Study:
        """The study of a run, as far as it came. Raises ConfigError where it is one of another configuration."""
        path = folder(config) / "tune.json"
        tree = config.model_dump(mode="json", exclude={"evaluate", "serve", "pretrain"})
        for section, key in FREE:
            del tree[section][key]
        if not path.exists():
            return Study(path, tree)
        found = json.loads(path.read_text(encoding="utf-8"))
        for section in tree:
            if found["config"].get(section) != tree[section]:
                raise ConfigError(
                    f"{path}: '{section}' was another when this study began; take another name=, or remove the folder"
                )
        trials = [Trial(**trial) for trial in found["trials"]]
        return Study(path, tree, trials, [trial for trial in trials if trial.status == "running"])

    def begin(self, values: dict[str, Any]) -> Trial:
        """A trial with these values: an interrupted one, else a new one."""
        for place, trial in enumerate(self.interrupted):
            if trial.values == values:
                return self.interrupted.pop(place)
        self.trials.append(Trial(f"trial-{len(self.trials):03d}", values))
        self.save()
        return self.trials[-1]

    def save(self) -> None:
        tree = {
            "metric": f"valid {CHOSEN_BY}",
            "best": self.best.name if self.best else None,
            "trials": [asdict(trial) for trial in self.trials],
            "config": self.config,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, json.dumps(tree, indent=1, ensure_ascii=False))

    @property
    def ended(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != "running"]

    @property
    def best(self) -> Trial | None:
        """Of the trials that were trained to their end, which alone have a checkpoint."""
        finished = [trial for trial in self.trials if trial.status == "finished"]
        return max(finished, key=lambda trial: trial.score or 0.0, default=None)

    def table(self) -> str:
        """The trials from the best to the worst, those that failed last."""
        rows = [f"{'trial':10} {'status':9} {CHOSEN_BY:>8} {'epochs':>7} {'seconds':>8}  values"]
        for trial in sorted(self.trials, key=lambda trial: -1.0 if trial.score is None else trial.score, reverse=True):
            score = "" if trial.score is None else f"{trial.score:.4f}"
            values = "  ".join(f"{key}={_short(value)}" for key, value in trial.values.items())
            told = f"  {trial.error}" if trial.error else ""
            rows.append(
                f"{trial.name:10} {trial.status:9} {score:>8} {trial.epochs:7d} {trial.seconds:8.1f}  {values}{told}"
            )
        return "\n".join(rows)


def folder(config: Config) -> Path:
    return Path(config.runs) / f"{config.name}-tune"


def check(config: Config) -> TuneConfig:
    """What is to be searched. Raises ConfigError where a key is none of the configuration's, or cannot have a value."""
    if config.tune is None:
        raise ConfigError("tune: missing; say tune.space, as in {train.lr: {kind: loguniform, low: 1e-4, high: 1e-2}}")
    for key, space in config.tune.space.items():
        for value in _probes(space):
            check_value(config, key, value, f"tune.space '{key}'")
        if key.split(".")[0] not in ("model", "train"):
            raise ConfigError(f"tune.space: expected keys of model and train, whose trials share data, found '{key}'")
    return config.tune


def _probes(space: Space) -> list[Any]:
    if isinstance(space, UniformSpace | LogUniformSpace):
        return [space.low, space.low + BETWEEN * (space.high - space.low), space.high]
    return [space.low, space.high] if isinstance(space, WholeSpace) else list(space.values)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
