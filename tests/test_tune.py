"""The search for settings: what can be searched, how a study goes on, and one small study on a local Ray."""

from __future__ import annotations

import json
import time

import pytest
import ray
import yaml

from mvrec_core.errors import ConfigError, DataError, ResourceError
from mvrec_core.reading import load_config
from pipelines import study
from pipelines.study import Study
from pipelines.train import train
from pipelines.tune import tune

RATE = {"kind": "loguniform", "low": 1e-4, "high": 1e-1}
WIDTH = {"kind": "choice", "values": [16, 15]}  # 15 is no multiple of two heads
SETTINGS = [{"train.lr": rate, "model.dim": dim} for rate, dim in ((0.02, 16), (1e-4, 16), (0.02, 15))]


def searched(config, **settings):
    """The configuration with a `tune` section, read as from a file."""
    tree = config.model_dump(mode="json")
    tree["tune"] = {"trials": 3, "space": {"train.lr": RATE, "model.dim": WIDTH}} | settings
    path = config.run_dir.parent / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return load_config(path)


def cores_are_free():
    until = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return free


@pytest.fixture
def config(plain_config, tmp_path):
    return plain_config.model_copy(update={"runs": str(tmp_path / "runs"), "name": "电影"})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.lrr": RATE}, "tune.space 'train.lrr': unknown key 'train.lrr'; did you mean 'lr'?"),
        ({"modle.dim": WIDTH}, "tune.space 'modle.dim': unknown key 'modle'; did you mean 'model'?"),
        ({"train.lr.x": RATE}, "tune.space 'train.lr.x': 'lr' is a value, not a section"),
        ({"train.lr": {"kind": "uniform", "low": -1, "high": 1}}, "tune.space 'train.lr': key 'train.lr': .* found -1"),
        ({"model.dim": {"kind": "uniform", "low": 8, "high": 64}}, "key 'model.dim': .*valid integer.*found 42.6"),
        ({"model.dropout": {"kind": "int", "low": 0, "high": 1}}, "key 'model.dropout': .*less than 1, found 1"),
        ({"train.loss": {"kind": "choice", "values": ["softmax", "hinge"]}}, "key 'train.loss': .*found 'hinge'"),
        ({"data.buckets": {"kind": "int", "low": 1, "high": 4}}, "tune.space: expected keys of model and train"),
    ],
)  # fmt: skip
def test_a_space_that_does_not_fit(config, space, message):
    with pytest.raises(ConfigError, match=message) as error:
        tune(searched(config, space=space))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trails": 3}, "unknown key 'tune.trails'; did you mean 'trials'?"),
        ({"space": {}}, "key 'tune.space'"),
        ({"space": {"train.lr": {"low": 1}}}, "key 'tune.space.train.lr' needs a 'kind'"),
        ({"space": {"train.lr": RATE | {"hihg": 1}}}, "unknown key 'tune.space.train.lr.hihg'; did you mean 'high'?"),
        ({"space": {"train.lr": RATE | {"low": 0}}}, "key 'tune.space.train.lr.low': .*greater than 0, found 0"),
        ({"space": {"train.lr": RATE | {"low": 1}}}, "tune.space.train.lr: expected low < high, found 1 and 0.1"),
    ],
)
def test_a_section_that_is_wrong(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        searched(config, **settings)


def test_what_a_value_needs_of_others_is_not_asked_before(config):
    assert study.check(searched(config)).trials == 3


def test_nothing_to_search_and_nothing_prepared(config):
    with pytest.raises(ConfigError, match="^tune: missing; say tune.space, as in "):
        tune(config)
    with pytest.raises(DataError, match="no prepared data"):
        tune(searched(config))


def test_a_study_goes_on_with_what_was_interrupted(config):
    first = Study.open(searched(config))
    for values in SETTINGS:
        first.begin(values)
    first.trials[1].status, first.trials[1].score = "finished", 0.25
    first.save()
    again = Study.open(searched(config, trials=9))  # more of them
    assert again.trials == first.trials and [trial.name for trial in again.ended] == ["trial-001"]
    assert again.begin(dict(SETTINGS[2])).name == "trial-002"
    assert again.begin(dict(SETTINGS[2])).name == "trial-003"  # the same values once more, at the same time
    assert again.begin({"train.lr": 0.5, "model.dim": 16}).name == "trial-004"
    assert again.best.name == "trial-001"
    told = again.table().splitlines()
    assert told[1].split() == ["trial-001", "finished", "0.2500", "0", "0.0", "train.lr=0.0001", "model.dim=16"]
    with pytest.raises(ConfigError, match="tune.json: 'train' was another when this study began"):
        Study.open(searched(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 9})})))


@pytest.mark.ray
def test_more_at_once_than_the_cluster_holds(tiny_prepared, tiny_config):
    cores = int(ray.cluster_resources()["CPU"])
    wrong = searched(tiny_config, at_once=cores + 1)
    told = (
        rf"^tune.at_once is {cores + 1} and train.workers 1, which is {cores + 1} cores, but the cluster has {cores}$"
    )
    with pytest.raises(ResourceError, match=told):
        tune(wrong)


@pytest.mark.ray
def test_a_study(tiny_prepared, tiny_config):
    """Three trials that were begun: one is good, one falls behind, one cannot be."""
    run = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"epochs": 12})})
    config, lines = searched(run), []
    interrupted = Study.open(config)
    for values in SETTINGS:
        interrupted.begin(values)
    best = tune(config, log=lines.append)

    found = json.loads((best.parent / "tune.json").read_text())
    good, behind, wrong = found["trials"]
    assert [trial["values"] for trial in found["trials"]] == SETTINGS
    assert [trial["status"] for trial in found["trials"]] == ["finished", "stopped", "failed"]
    assert behind["epochs"] < good["epochs"] == 12 and behind["score"] < good["score"]
    assert wrong["error"] == "trial-002: model: dim 15 is not a multiple of heads 2"
    assert (found["best"], best.name) == ("trial-000", "trial-000")
    assert any(line.startswith("tune: trial-002 failed: trial-002: model: dim 15") for line in lines)
    assert sorted(path.name for path in best.iterdir()) == [
        "checkpoint", "config.yaml", "curves.jsonl", "prepared", "tracking", "train.log"
    ]  # fmt: skip
    assert not (best.parent / "trial-001" / "checkpoint").exists()
    assert cores_are_free()  # the workers of the stopped trial too

    assert tune(config, log=lines.append) == best  # nothing is left to do
    assert json.loads((best.parent / "tune.json").read_text()) == found
    weights = (best / "checkpoint" / "model.safetensors").read_bytes()
    again = train(load_config(best / "config.yaml"), overwrite=True, log=lines.append)
    assert (again / "model.safetensors").read_bytes() == weights
