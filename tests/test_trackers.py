from __future__ import annotations

import math
import shutil
import sqlite3
import sys
import time

import pytest

from mvrec_core.errors import ConfigError
from mvrec_core.metrics import NAMES as METRICS
from mvrec_core.metrics import RankingSums
from mvrec_core.reading import load_config
from mvrec_core.training import Epoch
from pipelines import trackers

VIEWS = {"id": 0.75, "标题": 0.25}
NAMES = {"loss", "learning_rate", "targets_per_second", "padding", "gradient_norm", "epoch", "weights/id"}


def epoch(number, refit=False):
    valid = None if refit else RankingSums(10, 0, (float(number),) * len(METRICS))
    return Epoch(number, 3, refit, 1 / number, 2.0, 100, valid, True, False, 7 * number, 1e-3, 50.0, 0.1, 2.0, VIEWS)


@pytest.fixture
def run(plain_config, tmp_path, monkeypatch):
    """A configuration with these trackers, in an empty folder where the processes of trackers may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def with_trackers(*names):
        train = plain_config.train.model_copy(update={"trackers": names})
        return plain_config.model_copy(update={"runs": str(tmp_path / "runs"), "name": "流浪", "train": train})

    return with_trackers


def follow(config, *epochs, begin=0):
    said = []
    with trackers.tracking(config, begin, said.append) as track:
        for each in epochs:
            track(each.step, trackers.figures(each))
    return said


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def metrics(folder):
    with sqlite3.connect(folder / "mlflow.db") as base:
        found = {}
        for run, name, step, value in base.execute("select run_uuid, key, step, value from metrics order by step"):
            found.setdefault(name, []).append((run, step, value))
        return found, base.execute("select run_uuid, status, name from runs").fetchall()


def test_the_names_are_ones_that_every_tracker_takes():
    found = trackers.figures(epoch(2))
    assert {*NAMES, "weights/标题", "valid/NDCG_10", "valid/AUC"} <= set(found)
    assert all(math.isfinite(value) and "@" not in name for name, value in found.items())
    assert (found["loss"], found["learning_rate"], found["targets_per_second"]) == (0.5, 1e-3, 50.0)
    again = trackers.figures(epoch(2, refit=True))
    assert again["refit/loss"] == 0.5 and all(name.startswith("refit/") for name in again)
    assert not any(name.startswith("refit/valid/") for name in again)


def test_tensorboard(run):
    config = run("tensorboard")
    assert follow(config, epoch(1), epoch(2)) == []
    found = scalars(config.run_dir / "tracking" / "tensorboard")
    assert set(found) == set(trackers.figures(epoch(1)))
    assert found["loss"] == [(7, 1.0), (14, 0.5)] and found["weights/标题"] == [(7, 0.25), (14, 0.25)]


def test_tensorboard_goes_on_where_training_resumed(run):
    config = run("tensorboard")
    follow(config, epoch(1), epoch(2))
    follow(config, epoch(2), epoch(3), begin=7)
    found = scalars(config.run_dir / "tracking" / "tensorboard")
    assert [step for step, _ in found["loss"]] == [7, 14, 21]
    follow(config, epoch(1))  # anew
    assert [step for step, _ in scalars(config.run_dir / "tracking" / "tensorboard")["loss"]] == [7]


def test_mlflow_goes_on_in_its_run(run, tmp_path):
    config = run("mlflow")
    assert follow(config, epoch(1), epoch(2)) == []
    assert follow(config, epoch(3), begin=14) == []
    found, runs = metrics(config.run_dir / "tracking" / "mlflow")
    assert [(status, name) for _, status, name in runs] == [("FINISHED", "流浪")]
    assert found["valid/NDCG_10"] == [(runs[0][0], 7 * n, pytest.approx(n / 10)) for n in (1, 2, 3)]
    assert set(found) == set(trackers.figures(epoch(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing besides


def test_mlflow_hears_that_training_failed(run):
    config = run("mlflow")
    with pytest.raises(RuntimeError, match="a worker"), trackers.tracking(config, 0, print) as track:
        track(7, {"loss": 1.0})
        raise RuntimeError("a worker")
    found, runs = metrics(config.run_dir / "tracking" / "mlflow")
    assert runs[0][1] == "FAILED" and found["loss"][0][1:] == (7, 1.0)


def test_wandb_offline_keeps_its_id(run):
    config = run("wandb")
    assert follow(config, epoch(1)) == follow(config, epoch(2), begin=7) == []
    folder = config.run_dir / "tracking" / "wandb"
    one, other = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert one.name == other.name == f"run-{(folder / 'run_id').read_text()}.wandb"
    for path in (one, other):  # records of a log, which another process may still be writing
        wanted, until = {"流浪", *trackers.figures(epoch(1))}, time.monotonic() + 30
        while (missing := {w for w in wanted if w.encode() not in path.read_bytes()}) and time.monotonic() < until:
            time.sleep(0.1)
        assert not missing


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(run):
    config = run("tensorboard", "mlflow")
    (config.run_dir / "tracking").mkdir(parents=True)
    (config.run_dir / "tracking" / "mlflow").write_text("in the way")
    said = follow(config, epoch(1), epoch(2), begin=1)
    assert len(said) == 1 and said[0].startswith("mlflow: ") and said[0].endswith("; going on without it")
    assert len(scalars(config.run_dir / "tracking" / "tensorboard")["loss"]) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in a thread of TensorBoard's
def test_a_disk_that_goes_away(run):
    config, said = run("tensorboard"), []
    folder = config.run_dir / "tracking" / "tensorboard"
    with trackers.tracking(config, 0, said.append) as track:
        track(1, {"loss": 1.0})
        until = time.monotonic() + 30
        while not any(folder.glob("events*")) and time.monotonic() < until:
            time.sleep(0.05)
        shutil.rmtree(folder)
        folder.write_text("in the way")
        for step in range(2, 30):
            track(step, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith("tensorboard: ") and said[0].endswith("; going on without it")


def test_a_tracker_that_hangs_does_not_hold_training(run, monkeypatch):
    config, said = run("mlflow"), []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers
    began = time.monotonic()
    with trackers.tracking(config, 0, said.append, patience_s=0.2) as track:
        track(7, {"loss": 1.0})
    assert time.monotonic() - began < 10
    assert len(said) == 1 and said[0].startswith("mlflow: ")


def test_a_tracker_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=r"^train.trackers: 'wandb' is not installed; pip install 'mvrec\[wandb\]'$"):
        trackers.check(run("tensorboard", "wandb"))
    trackers.check(run("tensorboard"))


def test_a_tracker_that_nobody_knows(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ndata: {events: {path: e.csv}}\nviews: {id: {kind: id}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="key 'train.trackers.0': .*found 'comet'"):
        load_config(path, ["train.trackers=[comet]"])
