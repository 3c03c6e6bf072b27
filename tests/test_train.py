"""The verbs on a local Ray of two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import torch

from mvrec_core.checkpoint import load
from mvrec_core.config import EvaluateConfig
from mvrec_core.errors import CheckpointError, DataError, ResourceError
from mvrec_core.metrics import NAMES
from mvrec_core.text import TextEncoder
from pipelines.evaluate import evaluate
from pipelines.recommend import recommend
from pipelines.train import train

pytestmark = pytest.mark.ray


def quiet(line):
    pass


def variant(config, **changes):
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def elsewhere(config, runs: Path, **changes):
    """The same run on the same prepared data, with its checkpoint in another place."""
    (runs / config.name).mkdir()
    (runs / config.name / "prepared").symlink_to((config.run_dir / "prepared").absolute())
    return variant(config, **changes).model_copy(update={"runs": str(runs)})


def test_two_workers_count_the_users_that_one_counts(checkpoint, tiny_config, tmp_path):
    lines = []
    two = train(elsewhere(tiny_config, tmp_path, workers=2), log=lines.append)
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (checkpoint, two))
    assert one["users"] == other["users"] == tiny.USERS
    assert abs(one["valid"]["NDCG@10"] - other["valid"]["NDCG@10"]) < 0.1
    assert lines[0] == "train: 2 worker(s) on CPU, loss softmax, scratch"
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"]
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == [
        "checkpoint",
        "curves.jsonl",
        "prepared",
        "tracking",
        "train.log",
    ]
    assert list((tmp_path / "tiny" / "tracking" / "tensorboard").glob("events.out.tfevents.*"))
    curves = [json.loads(line) for line in (tmp_path / "tiny" / "curves.jsonl").read_text().splitlines()]
    assert [point["epoch"] for point in curves] == [1, 2]
    assert max(point["valid"]["NDCG@10"] for point in curves) == pytest.approx(other["valid"]["NDCG@10"])


def test_a_checkpoint_of_an_encoder_that_was_shared_out_is_whole(tiny_prepared, tiny_config, tmp_path):
    text = tiny_config.model.text.model_copy(update={"tune": "full"})
    tuned = tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update={"text": text})})
    written = train(elsewhere(tuned, tmp_path, workers=2, shard_text=True, epochs=1), log=quiet)
    learnt, before = load(written).model.text, TextEncoder(text, ["film number 3"])
    assert sum(p.numel() for p in learnt.encoder.parameters()) == sum(p.numel() for p in before.encoder.parameters())
    assert not torch.equal(learnt.embed(["film number 3"]), before.embed(["film number 3"]))
    moved = [not torch.equal(one, other) for one, other in zip(learnt.parameters(), before.parameters(), strict=True)]
    assert all(moved)


def test_a_checkpoint_has_the_scores_and_weights_of_validation_users(checkpoint, tiny_config):
    seen = load(checkpoint).reference
    assert seen.users == json.loads((checkpoint / "metrics.json").read_text())["users"]
    assert set(seen.scores) == {"score", "score_at_now"} and set(seen.weights) >= {"id", "text", "rating"}
    assert all(sum(bins.shares) == pytest.approx(1) for bins in [*seen.scores.values(), *seen.weights.values()])


def test_a_run_with_a_checkpoint_is_not_trained_over(checkpoint, tiny_config):
    before = (checkpoint / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="run 'tiny' has a checkpoint already; take another name="):
        train(tiny_config, log=quiet)
    assert (checkpoint / "manifest.json").read_bytes() == before


def test_more_workers_than_cores(tiny_prepared, tiny_config, tmp_path):
    with pytest.raises(ResourceError, match=r"^train.workers is 3, but the cluster has 2 cores$"):
        train(elsewhere(tiny_config, tmp_path, workers=3), log=quiet)


def test_a_gpu_that_is_not_there(tiny_prepared, tiny_config, tmp_path):
    with pytest.raises(ResourceError, match="train.device is gpu and train.workers 1, but the cluster has 0 GPUs"):
        train(elsewhere(tiny_config, tmp_path, device="gpu"), log=quiet)


def test_nothing_prepared(tiny_config, tmp_path):
    with pytest.raises(DataError, match="no prepared data .* run 'mvrec prepare' first"):
        train(tiny_config.model_copy(update={"runs": str(tmp_path)}), log=quiet)


def test_metrics_of_a_checkpoint(checkpoint, tmp_path):
    lines = []
    report = evaluate(checkpoint, tmp_path / "metrics.json", log=lines.append)
    written = json.loads((tmp_path / "metrics.json").read_text())
    keys = {"protocol", "users", "valid", "test", "segments", "baselines", "seed", "init", "model_version"}
    assert written == report and keys <= set(report)
    assert (report["users"], report["valid_users"], report["test_users"]) == (tiny.USERS,) * 3
    assert (report["protocol"]["items"], report["protocol"]["exclude_seen"], report["seed"]) == (tiny.ITEMS, True, 0)
    assert set(report["baselines"]) == {"popularity", "item_knn", "als"}
    for metrics in (report["valid"], report["test"], *(b["test"] for b in report["baselines"].values())):
        assert list(metrics) == list(NAMES) and all(0 <= value <= 1 for value in metrics.values())
    low, high = report["intervals"]["HR@10"]
    assert low < report["test"]["HR@10"] < high
    segments = report["segments"].values()
    assert sum(s["users"] for s in segments) == 2 * tiny.USERS  # by user, and by item
    assert json.loads((checkpoint / "metrics.json").read_text())["valid"]["NDCG@10"] == pytest.approx(
        report["valid"]["NDCG@10"], abs=1e-6
    )


def test_chosen_baselines_only(checkpoint):
    settings = EvaluateConfig(baselines=("popularity",))
    assert list(evaluate(checkpoint, settings=settings, log=quiet)["baselines"]) == ["popularity"]


@pytest.mark.parametrize(("stage", "users"), [("test", tiny.USERS), ("live", tiny.USERS + 3)])
def test_lists_as_parquet(checkpoint, tmp_path, stage, users):
    out = tmp_path / "lists" / f"{stage}.parquet"
    assert recommend(checkpoint, stage, 7, out, log=quiet) == 7 * users
    table = pq.read_table(out)
    assert table.schema.names == ["user_id", "rank", "item_id", "score"] and table.num_rows == 7 * users
    assert table["rank"].to_pylist() == list(range(1, 8)) * users
    assert set(table["item_id"].to_pylist()) <= {f"i{n:02d}" for n in range(tiny.ITEMS)}
    assert [p.name for p in out.parent.iterdir()] == [out.name]
