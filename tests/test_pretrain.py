"""The verb on a local Ray of two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvrec_core.config import EvaluateConfig
from mvrec_core.errors import CheckpointError, ConfigError
from mvrec_core.metrics import NAMES
from mvrec_core.sealed import verify
from pipelines.evaluate import evaluate
from pipelines.pretrain import pretrain
from pipelines.train import train

pytestmark = pytest.mark.ray


def quiet(line):
    pass


def elsewhere(config, runs: Path, **changes):
    """The same run on the same prepared data, in another place."""
    (runs / config.name).mkdir(parents=True)
    (runs / config.name / "prepared").symlink_to((config.run_dir / "prepared").absolute())
    settings = config.train.model_copy(update=changes)
    return config.model_copy(update={"runs": str(runs), "train": settings})


@pytest.fixture(scope="module")
def pretrained(tiny_config, tiny_prepared, tmp_path_factory):
    """The configuration of a run that is pretrained, texts too, and the lines that were logged."""
    config = elsewhere(tiny_config, tmp_path_factory.mktemp("runs"), init="pretrained")
    settings = config.pretrain.model_copy(update={"epochs": 2, "text_epochs": 1})
    config, lines = config.model_copy(update={"pretrain": settings}), []
    assert pretrain(config, log=lines.append) == config.run_dir / "pretrained"
    return config, lines


def test_the_run_holds_what_was_pretrained(pretrained):
    config, lines = pretrained
    assert lines[0] == "pretrain: 1 worker(s) on CPU"
    assert [line.split("  ")[0] for line in lines[1:4]] == ["text epoch", "views epoch", "views epoch"]
    assert sorted(p.name for p in config.run_dir.iterdir()) == ["prepared", "pretrain.log", "pretrained"]
    assert "losses.json" in verify(config.run_dir / "pretrained")["files"]
    losses = json.loads((config.run_dir / "pretrained" / "losses.json").read_text())
    assert [len(losses["text"]), len(losses["views"])] == [1, 2]
    with pytest.raises(CheckpointError, match="run 'tiny' is pretrained already; --overwrite to pretrain anew"):
        pretrain(config, log=quiet)


def test_training_starts_there_and_says_so(pretrained, checkpoint):
    config, _ = pretrained
    lines = []
    directory = train(config, log=lines.append)
    assert lines[0] == "train: 1 worker(s) on CPU, loss softmax, pretrained"
    inits = [json.loads((path / "metrics.json").read_text())["init"] for path in (directory, checkpoint)]
    assert inits == ["pretrained", "scratch"]
    assert [
        evaluate(path, settings=EvaluateConfig(baselines=(), hybrid=()), log=quiet)["init"]
        for path in (directory, checkpoint)
    ] == inits
    shown, out = [], config.run_dir / "metrics.json"
    alone = EvaluateConfig(baselines=(), hybrid=())
    evaluate(directory, out, alone, log=shown.append)
    assert "from scratch: not measured; --beside CHECKPOINT of a run with train.init=scratch" in shown[-2].splitlines()
    assert "the same from scratch was not measured" in out.with_name("report.html").read_text(encoding="utf-8")
    report = evaluate(directory, out, alone, log=quiet, beside=checkpoint)
    scratch = report["beside"]["from scratch"]
    assert scratch["model_version"] == verify(checkpoint)["model_version"]
    page = out.with_name("report.html").read_text(encoding="utf-8")
    assert "mvrec − from scratch" in page and "was not measured" not in page
    assert set(scratch["difference"]) == set(NAMES)
    for metric, of in scratch["difference"].items():
        assert of["mean"] == pytest.approx(report["test"][metric] - scratch["test"][metric], abs=1e-12)
    out.unlink()
    out.with_name("report.html").unlink()
    words = "embeddings.word_embeddings.weight"
    one, two = (
        load_file(path / "text_encoder" / "model.safetensors")[words]
        for path in (config.run_dir / "pretrained", directory)
    )
    assert torch.equal(one, two)


def test_two_workers(tiny_config, tiny_prepared, tmp_path, pretrained):
    config = elsewhere(tiny_config, tmp_path, workers=2).model_copy(update={"pretrain": pretrained[0].pretrain})
    other = json.loads((pretrain(config, log=quiet) / "losses.json").read_text())
    one = json.loads((pretrained[0].run_dir / "pretrained" / "losses.json").read_text())
    for phase in ("text", "views"):
        for mine, theirs in zip(one[phase], other[phase], strict=True):
            assert mine.keys() == theirs.keys()
    assert sum(other["views"][1].values()) < sum(other["views"][0].values())


def test_nothing_pretrained(tiny_config, tiny_prepared, tmp_path):
    with pytest.raises(CheckpointError, match="nothing is pretrained; run 'mvrec pretrain' first"):
        train(elsewhere(tiny_config, tmp_path, init="pretrained"), log=quiet)


def test_the_linear_fusion(tiny_config, tiny_prepared, tmp_path):
    config = elsewhere(tiny_config, tmp_path)
    linear = config.model.model_copy(update={"fusion": "linear"})
    with pytest.raises(ConfigError, match="found 'linear'"):
        pretrain(config.model_copy(update={"model": linear}), log=quiet)
