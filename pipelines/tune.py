"""A search for settings on Ray Tune: Optuna proposes, ASHA stops what falls behind, each trial is a training run."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup, remove_placement_group

from mvrec_core.config import ChoiceSpace, Config, Space, WholeSpace
from mvrec_core.errors import MVRecError, ResourceError
from mvrec_core.reading import changed, parse_config
from mvrec_core.training import CHOSEN_BY
from pipelines import datasets, files, study, trackers
from pipelines.cluster import connect, node_cores
from pipelines.run_report import read_curves
from pipelines.study import Study
from pipelines.train import CURVES, train

SCORE = "best"  # what Tune compares: the best validation so far
ERROR = "error"  # why a trial failed
PLACEMENT = "placement"  # the placement group of a trial's workers
RUNGS, REDUCTION = 2, 3  # ASHA looks at 1/9 and 1/3 of the epochs, and each time the better third goes on


def tune(config: Config, log: Callable[[str], None] = print) -> Path | None:
    """Runs the trials that <runs>/<name>-tune does not have yet; returns the folder of the best, which is a run.

    Raises ConfigError where the space does not fit, ResourceError where the cluster is too small, and what the trials
    failed with where all of them did.
    """
    settings = study.check(config)
    trackers.check(config)
    datasets.training(config)  # that it is prepared
    trials = Study.open(config)
    left = settings.trials - len(trials.ended)
    if left > 0:
        connect()
        _check_room(config)
        log(f"tune: {left} trial(s), {settings.at_once} at once, each of {config.train.workers} worker(s)")
        _search(config, trials, left, log)
    log(trials.table())
    if trials.best is None:
        raise MVRecError(f"{trials.path}: no trial came to its end: {trials.trials[0].error}")
    best = study.folder(config) / trials.best.name
    log(f"tune: the best is the run {best}; mvrec train --config {best / 'config.yaml'} --overwrite makes it anew")
    return best


def _search(config: Config, trials: Study, left: int, log: Callable[[str], None]) -> None:
    assert config.tune is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # progress is told in our words
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a trial has its own files
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints even where it is to be silent
    storage = (study.folder(config) / "ray").absolute()
    shutil.rmtree(storage, ignore_errors=True)
    threads = config.train.threads or max(1, node_cores() // (config.tune.at_once * config.train.workers))
    base = changed(config, {"tune": None, "train.threads": threads}, "tune")  # alone or not, a trial has the same bits
    trial = partial(_trial, tree=base.model_dump(mode="json"), cwd=str(Path.cwd()))
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, {"memory": 1}),  # next to nothing: its workers ask for the cores
        tune_config=ray_tune.TuneConfig(
            metric=SCORE,
            mode="max",
            num_samples=left,
            max_concurrent_trials=config.tune.at_once,
            search_alg=_Proposals(trials, config.tune.space, config.seed),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.train.epochs + 1,
                grace_period=max(1, config.train.epochs // REDUCTION**RUNGS),
                reduction_factor=REDUCTION,
            ),
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=str(storage), verbose=0, callbacks=[_Keeper(trials, log)]
        ),
    )
    tuner.fit()
    shutil.rmtree(storage, ignore_errors=True)


class _Proposals(OptunaSearch):
    """TPE that knows the trials which ended, begins with those that were interrupted, and names each one."""

    def __init__(self, trials: Study, space: dict[str, Space], seed: int):
        kinds = {key: _distribution(one) for key, one in space.items()}
        again = [trial.values for trial in trials.interrupted]
        super().__init__(kinds, SCORE, "max", points_to_evaluate=again, seed=seed + len(trials.ended))
        for trial in trials.ended:
            self.add_evaluated_point(trial.values, trial.score or 0.0, error=trial.score is None)
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        values = super().suggest(trial_id)
        return values and {"trial": self.trials.begin(values).name, "values": values}


class _Keeper(ray_tune.Callback):
    """Writes down how each trial ended, and tells."""

    def __init__(self, trials: Study, log: Callable[[str], None]):
        self.trials, self.log = trials, log

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, (trial.last_result or {}).get(ERROR))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "its process died")

    def _end(self, ended: Any, error: str | None) -> None:
        trial = next(trial for trial in self.trials.trials if trial.name == ended.config["trial"])
        last, run = ended.last_result or {}, self.trials.path.parent / trial.name
        if last.get(PLACEMENT):  # Tune kills a trial; without a dashboard Ray Train would keep the cores of its workers
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(last[PLACEMENT]))))
        trial.error, trial.seconds = error, round(last.get("time_total_s", 0.0), 1)
        if error:
            trial.status = "failed"
        elif (run / "checkpoint").exists():
            trial.status = "finished"
            trial.score, trial.epochs = _ended(run)
        else:
            trial.status, trial.score, trial.epochs = "stopped", last[SCORE], last["epoch"]
        self.trials.save()
        self.log(f"tune: {trial.name} {trial.status}" + (f": {error}" if error else f", {CHOSEN_BY} {trial.score:.4f}"))


def _trial(given: dict[str, Any], tree: dict[str, Any], cwd: str) -> None:
    """In a process of Tune's: one training run, as `mvrec train` makes it."""
    if Path(cwd).is_dir():
        os.chdir(cwd)
    base = parse_config(tree, "the run's configuration")
    try:
        score, epochs = _train(base, given["trial"], given["values"])
    except Exception as error:  # the study goes on
        told = str(error).strip().splitlines() or [type(error).__name__]
        ray_tune.report({SCORE: math.nan, "epoch": 0, ERROR: told[-1]})
    else:
        ray_tune.report({SCORE: score, "epoch": epochs})


def _train(base: Config, name: str, values: dict[str, Any]) -> tuple[float, int]:
    """Makes the run of a trial, unless it has come to its end already: its score, and how many epochs there were."""
    config = changed(base, {**values, "runs": str(study.folder(base)), "name": name}, name)
    run = config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    for shared in ("prepared", "pretrained"):
        if (base.run_dir / shared).exists() and not (run / shared).is_symlink():
            (run / shared).symlink_to(os.path.relpath(base.run_dir / shared, run))
    plain = yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    files.write_text(run / "config.yaml", plain)
    if not (run / "checkpoint").exists():
        train(config, log=lambda line: None, callbacks=(_Report(),))
    return _ended(run)


def _ended(run: Path) -> tuple[float, int]:
    """The score of a run with a checkpoint, and the epochs that it was looked for in."""
    metrics = json.loads((run / "checkpoint" / "metrics.json").read_text(encoding="utf-8"))
    return metrics["valid"][CHOSEN_BY], read_curves(run / CURVES)[-1]["epoch"]


class _Report(TuneReportCallback):
    """Tells Tune the best validation after each epoch but the last: what has come so far is not worth stopping."""

    def __init__(self) -> None:
        super().__init__()
        self.best = 0.0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        score = metrics[0].get(f"valid/{CHOSEN_BY}")
        if score is None or metrics[0]["last"]:
            return
        self.best = max(self.best, score)
        told = {SCORE: self.best, **{name: metrics[0][name] for name in ("epoch", PLACEMENT)}}
        super().after_report(run_context, [told], None)


def _check_room(config: Config) -> None:
    assert config.tune is not None
    asked, there = config.tune.at_once * config.train.workers, ray.cluster_resources()
    gpus, workers, device = there.get("GPU", 0), config.train.workers, config.train.device
    told = f"tune.at_once is {config.tune.at_once} and train.workers {workers}, which is"
    if asked > there.get("CPU", 0):
        raise ResourceError(f"{told} {asked} cores, but the cluster has {there.get('CPU', 0):g}")
    if asked > gpus and (device == "gpu" or (device == "auto" and gpus >= workers)):
        raise ResourceError(f"{told} {asked} GPUs, but the cluster has {gpus:g}")


def _distribution(space: Space) -> BaseDistribution:
    if isinstance(space, ChoiceSpace):
        return CategoricalDistribution(space.values)
    if isinstance(space, WholeSpace):
        return IntDistribution(space.low, space.high)
    return FloatDistribution(space.low, space.high, log=space.kind == "loguniform")


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("tune")
