"""The verb on a checkpoint, in this process and without Ray."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from mvrec_core import checkpoint, ranking, training
from mvrec_core.catalog import FIRST
from mvrec_core.config import EvaluateConfig
from mvrec_core.errors import ConfigError, DataError, MVRecError
from mvrec_core.hybrid import WEIGHTS
from mvrec_core.metrics import NAMES, per_user
from mvrec_core.recommender import Recommender
from mvrec_core.sealed import verify
from mvrec_core.sequences import TEST, TRAIN
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers
from pipelines.compare import compare
from pipelines.evaluate import evaluate

ALL = ("popularity", "recent_popularity", "own_frequency", "item_knn", "als", "bpr", "content")


def quiet(line):
    pass


def settings(**changes) -> EvaluateConfig:
    return EvaluateConfig(**({"batch_size": 32} | changes))


@pytest.fixture(scope="module")
def report(plain_checkpoint):
    return evaluate(plain_checkpoint, settings=settings(baselines=ALL), log=quiet)


def saved(directory, config, data, seed=0, epochs=2):
    """A checkpoint of `data`, trained for a while."""
    config = config.model_copy(
        update={"seed": seed, "train": config.train.model_copy(update={"epochs": max(1, epochs)})}
    )
    histories = data.histories(config)
    model = checkpoint.new_model(config, data, Shards.whole(histories))
    model.text.refresh()
    if epochs:
        for _ in training.fit(model, Shards.whole(histories), config, Workers()):
            pass
    checkpoint.save(directory, model, data, ranking.catalogue(model)[1], {})
    return directory


def with_items(data, items) -> checkpoint.Data:
    """The same users with other lists of items."""
    users = data.users.set_column(
        data.users.schema.get_field_index("item"), "item", pa.array(items, pa.list_(pa.string()))
    )
    return checkpoint.Data(data.catalog, data.fitted, users)


# metrics.json


def test_every_baseline_has_its_row(plain_checkpoint, tmp_path):
    lines = []
    out = tmp_path / "metrics.json"
    report = evaluate(plain_checkpoint, out, settings(baselines=ALL), lines.append)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    keys = {"protocol", "users", "valid", "test", "segments", "baselines", "seed", "model_version", "intervals"}
    assert keys | {"beyond", "calibration", "hybrid", "seconds"} <= set(report)
    assert tuple(report["baselines"]) == ALL
    for rows in (report, report["hybrid"], *report["baselines"].values()):
        for stage in ("valid", "test"):
            assert list(rows[stage]) == list(NAMES) and all(0 <= value <= 1 for value in rows[stage].values())
    printed = "\n".join(lines)
    assert all(f"\n{name:18}" in printed for name in (*ALL, "mvrec", "hybrid"))
    assert f"{report['test']['HR@10']:.4f}" in printed and f"{report['hybrid']['test']['NDCG@10']:.4f}" in printed


def test_our_metrics_are_those_of_training(plain_checkpoint, report):
    recommender = Recommender.load(plain_checkpoint)
    for stage in ("valid", "test"):
        _, ranked = recommender.stored.ranks(stage)
        assert list(report[stage].values()) == pytest.approx(per_user(ranked).mean(0).tolist(), abs=1e-9)


def test_without_seen_items_the_own_frequency_is_popularity(report):
    baselines = report["baselines"]
    assert baselines["own_frequency"]["test"] == pytest.approx(baselines["popularity"]["test"])


def test_settings_reach_the_baselines(plain_checkpoint, report):
    changed = settings(baselines=("item_knn",), hybrid=(), item_knn={"neighbours": 2}, exclude_seen=False)
    other = evaluate(plain_checkpoint, settings=changed, log=quiet)
    assert list(other["baselines"]) == ["item_knn"] and other["hybrid"] == {}
    assert other["protocol"]["exclude_seen"] is False
    assert other["baselines"]["item_knn"]["test"] != report["baselines"]["item_knn"]["test"]


def test_content_where_there_is_none(plain_data, plain_config, tmp_path):
    views = {name: view for name, view in plain_config.views.items() if name not in ("text", "genres")}
    config = plain_config.model_copy(update={"views": views})
    histories = plain_data.histories(config)
    model = checkpoint.new_model(config, plain_data, Shards.whole(histories))
    checkpoint.save(tmp_path / "c", model, plain_data, ranking.catalogue(model)[1], {})
    with pytest.raises(ConfigError, match="'content' needs a text view or a category view of items"):
        evaluate(tmp_path / "c", settings=settings(baselines=("content",)), log=quiet)


def test_content_of_categories_where_there_is_no_text(plain_data, plain_config, tmp_path):
    config = plain_config.model_copy(update={"views": {n: v for n, v in plain_config.views.items() if n != "text"}})
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config))
    checkpoint.save(tmp_path / "c", model, plain_data, ranking.catalogue(model)[1], {})
    found = evaluate(tmp_path / "c", settings=settings(baselines=("content", "popularity"), hybrid=()), log=quiet)
    assert (
        set(found["beyond"]["test"]) >= {"diversity_genres@10"} and "diversity_text@10" not in found["beyond"]["test"]
    )
    assert found["baselines"]["content"]["test"] != found["baselines"]["popularity"]["test"]


def test_a_model_that_has_seen_validation_is_not_judged_by_it(plain_data, plain_config, tmp_path):
    train = plain_config.train.model_copy(update={"refit": True})
    config = plain_config.model_copy(update={"train": train})
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config), before=TEST)
    told = {"valid": {"HR@10": 0.5, "NDCG@10": 0.25}}
    checkpoint.save(tmp_path / "c", model, plain_data, ranking.catalogue(model)[1], told)
    found = evaluate(tmp_path / "c", settings=settings(baselines=("popularity",)), log=quiet)
    assert found["valid"] == told["valid"] and found["hybrid"] == {}
    assert found["protocol"]["trained_on"] == "train and valid" and found["test"]["HR@10"] != 0.5


# hybrid


def test_the_hybrid_is_the_best_of_what_was_tried_on_validation(report):
    hybrid = report["hybrid"]
    tried = hybrid["tried"]
    assert set(tried) == {"item_knn", "als"} and all(list(t) == [str(w) for w in WEIGHTS] for t in tried.values())
    best = max(value for by_weight in tried.values() for value in by_weight.values())
    assert tried[hybrid["cf"]][str(hybrid["weight"])] == best == hybrid["valid"]["NDCG@10"]


def test_the_ends_of_the_hybrid_are_its_two_models(report):
    for name, tried in report["hybrid"]["tried"].items():
        assert tried["0.0"] == pytest.approx(report["valid"]["NDCG@10"], abs=1e-9)
        assert tried["1.0"] == pytest.approx(report["baselines"][name]["valid"]["NDCG@10"], abs=1e-9)


def test_the_hybrid_needs_no_row_of_its_cf_model(plain_checkpoint, report):
    alone = evaluate(plain_checkpoint, settings=settings(baselines=(), hybrid=("als",)), log=quiet)
    assert alone["hybrid"]["tried"]["als"] == report["hybrid"]["tried"]["als"]


# beyond accuracy and calibration, by the lists that people get


def test_beyond_accuracy_is_that_of_the_lists(plain_recommender, report):
    histories = plain_recommender.histories
    lists = plain_recommender.stored.lists("test", 10).to_pydict()["item_id"]
    found = report["beyond"]["test"]
    assert found["coverage@10"] == pytest.approx(len(set(lists)) / tiny.ITEMS)
    train = histories.item[histories.split == TRAIN]
    count = dict(zip(*np.unique(train[train >= FIRST], return_counts=True), strict=True))
    place = {name: FIRST + n for n, name in enumerate(plain_recommender.item_ids)}
    novelty = [-np.log2(count.get(place[item], 1) / sum(count.values())) for item in lists]
    assert found["novelty@10"] == pytest.approx(np.mean(novelty), abs=1e-9)
    taken = [
        np.mean([count.get(j, 0) for j in histories.item[s : e - 1] if j >= FIRST])
        for s, e in zip(histories.offsets, histories.offsets[1:], strict=False)
        if e - s >= 3
    ]
    listed = np.mean([count.get(place[item], 0) for item in lists])
    assert found["popularity_bias@10"] == pytest.approx(listed / np.mean(taken), abs=1e-9)


def test_popularity_covers_less(report):
    popular, ours = report["baselines"]["popularity"]["beyond"], report["beyond"]["test"]
    assert popular["coverage@10"] < ours["coverage@10"] == 1


def test_calibration_is_of_all_candidates_of_all_test_users(plain_recommender, report):
    calibration = report["calibration"]
    histories, seen = plain_recommender.histories, 0
    examples, _ = plain_recommender.stored.ranks("test")
    for user, stop in zip(examples.user, examples.stop, strict=True):
        seen += len(np.unique(histories.item[histories.events_of(user, stop)]))
    assert sum(n for _, _, n in calibration["bins"]) == tiny.USERS * tiny.ITEMS - seen
    assert sum(n for _, _, n in calibration["bins_top10"]) == tiny.USERS * 10
    hits = sum(observed * n for _, observed, n in calibration["bins_top10"])
    assert hits == pytest.approx(report["test"]["HR@10"] * tiny.USERS)
    assert 0 < calibration["ece"] < 1 and 0 < calibration["ece_top10"] < 1


# segments


def test_items_without_train_events_are_the_cold_segment(plain_config, plain_data, tmp_path):
    """A film that is tested has its train events given to another one, as where items are held back."""
    users = plain_data.users.to_pylist()
    test = [user["item"][-1] for user in users if TEST in user["split"]]
    gone = max(sorted(set(test)), key=test.count)
    other = "i00" if gone != "i00" else "i01"
    items = [
        [other if item == gone and split == TRAIN else item for item, split in zip(u["item"], u["split"], strict=True)]
        for u in users
    ]
    directory = saved(tmp_path / "c", plain_config, with_items(plain_data, items), epochs=0)
    segments = evaluate(directory, settings=settings(baselines=(), hybrid=()), log=quiet)["segments"]
    cold = segments["item/cold"]
    assert (cold["items"], cold["users"], cold["unrankable"]) == (1, test.count(gone), 0)
    assert cold["users"] > 1 and cold["share"] == pytest.approx(cold["users"] / len(test))
    assert cold["AUC"] > 0  # it is in the catalogue, so it is ranked
    for kind in ("user", "item"):
        parts = [part for name, part in segments.items() if name.startswith(kind)]
        assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert sum(part.get("items", 0) for part in segments.values()) == tiny.ITEMS


def test_an_item_outside_the_catalogue_is_cold_and_cannot_be_ranked(plain_checkpoint, plain_data, tmp_path):
    items = plain_data.users["item"].to_pylist()
    items[4][-1] = "from nowhere"
    loaded = checkpoint.load(plain_checkpoint)
    checkpoint.save(tmp_path / "c", loaded.model, with_items(plain_data, items), loaded.item_vectors, {})
    cold = evaluate(tmp_path / "c", settings=settings(baselines=(), hybrid=()), log=quiet)["segments"]["item/cold"]
    assert (cold["items"], cold["users"], cold["unrankable"], cold["HR@20"]) == (0, 1, 1, 0.0)


# two checkpoints


def test_a_checkpoint_does_not_differ_from_itself(plain_checkpoint):
    lines = []
    found = compare(plain_checkpoint, plain_checkpoint, lines.append)
    assert all((d.difference, d.low, d.high, d.p) == (0, 0, 0, 1) for d in found.values())
    assert lines[0].splitlines()[-1].startswith(f"{tiny.USERS} test users; first: {plain_checkpoint}; second: ")


def test_a_trained_model_beats_an_untrained_one(plain_checkpoint, plain_config, plain_data, tmp_path):
    other = saved(tmp_path / "other", plain_config, plain_data, seed=1, epochs=0)
    found = compare(plain_checkpoint, other, quiet)
    assert list(found) == list(NAMES)
    ours, theirs = (Recommender.load(d).stored.ranks("test")[1] for d in (plain_checkpoint, other))
    mean = (per_user(ours) - per_user(theirs)).mean(0)
    assert [d.difference for d in found.values()] == pytest.approx(mean.tolist())
    assert found["AUC"].low > 0 and found["AUC"].p < 0.01


def test_another_checkpoint_has_a_row_beside_the_first(plain_checkpoint, plain_config, plain_data, tmp_path):
    other = saved(tmp_path / "other", plain_config.model_copy(update={"name": "另一个"}), plain_data, seed=1, epochs=0)
    lines = []
    plain = settings(baselines=(), hybrid=())
    report = evaluate(plain_checkpoint, tmp_path / "metrics.json", plain, lines.append, beside=other)
    (label,) = report["beside"]
    assert label == f"另一个 {verify(other)['model_version']}"
    theirs = evaluate(other, settings=plain, log=quiet)["test"]
    assert report["beside"][label]["test"] == pytest.approx({name: theirs[name] for name in NAMES})
    (row,) = [line for line in lines[-2].splitlines() if line.startswith(label)]
    assert row.split()[-1] == f"{theirs['NDCG@10']:.4f}"
    assert f"mvrec − {label}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_users_are_matched_by_id_not_by_place(plain_checkpoint, plain_config, plain_data, tmp_path):
    backwards = checkpoint.Data(
        plain_data.catalog, plain_data.fitted, plain_data.users.take(np.arange(len(plain_data.users))[::-1])
    )
    shutil.copytree(plain_checkpoint, tmp_path / "whole")
    loaded = checkpoint.load(plain_checkpoint)
    checkpoint.save(tmp_path / "backwards", loaded.model, backwards, loaded.item_vectors, {})
    found = compare(tmp_path / "whole", tmp_path / "backwards", quiet)
    assert max(abs(d.high - d.low) for d in found.values()) < 1e-6


def test_other_users(plain_checkpoint, plain_data, tmp_path):
    loaded = checkpoint.load(plain_checkpoint)
    fewer = checkpoint.Data(plain_data.catalog, plain_data.fitted, plain_data.users.slice(2))
    checkpoint.save(tmp_path / "fewer", loaded.model, fewer, loaded.item_vectors, {})
    with pytest.raises(DataError, match=r"test users differ: 2 only in .*, such as 'u000', not in .*fewer"):
        compare(plain_checkpoint, tmp_path / "fewer", quiet)


def test_another_split(plain_checkpoint, plain_data, tmp_path):
    items = plain_data.users["item"].to_pylist()
    items[4][-1] = "i00" if items[4][-1] != "i00" else "i01"
    other = with_items(plain_data, items)
    loaded = checkpoint.load(plain_checkpoint)
    checkpoint.save(tmp_path / "other", loaded.model, other, loaded.item_vectors, {})
    with pytest.raises(DataError, match=r"^test item of user 'u004': .* so the two were not split alike"):
        compare(plain_checkpoint, tmp_path / "other", quiet)


def test_another_catalogue(plain_checkpoint, plain_config, plain_data, tmp_path):
    renamed = plain_data.catalog.table["item_id"].to_pylist()
    renamed[3] = "other"
    table = plain_data.catalog.table
    catalog = type(plain_data.catalog)(table.set_column(0, "item_id", [renamed]))
    loaded = checkpoint.load(plain_checkpoint)
    data = checkpoint.Data(catalog, plain_data.fitted, plain_data.users)
    checkpoint.save(tmp_path / "other", loaded.model, data, loaded.item_vectors, {})
    with pytest.raises(DataError, match=r"items of the catalogue differ: 1 only in .*, such as 'i03', not in"):
        compare(plain_checkpoint, tmp_path / "other", quiet)


# NaN


def test_a_model_of_nan_stops_the_evaluation(plain_checkpoint, plain_data, tmp_path):
    loaded = checkpoint.load(plain_checkpoint)
    vectors = loaded.item_vectors.clone()
    vectors[5, 0] = torch.nan
    checkpoint.save(tmp_path / "c", loaded.model, plain_data, vectors, {})
    with pytest.raises(MVRecError, match="found NaN for user row 0, item column 5"):
        evaluate(tmp_path / "c", settings=settings(), log=quiet)


def test_the_time_of_the_target_can_be_kept_from_the_model(
    report, plain_recommender, plain_data, plain_config, tmp_path
):
    unknown = report["test_at_unknown_time"]
    assert set(unknown) == set(report["test"]) and unknown["AUC"] != report["test"]["AUC"]
    asked = plain_recommender.stored.ranks("test")[1]
    told, untold = (plain_recommender.stored.ranks("test", timed=timed)[1] for timed in (True, False))
    assert told.above.tolist() == asked.above.tolist() != untold.above.tolist()
    config = plain_config.model_copy(update={"views": {n: v for n, v in plain_config.views.items() if n != "time"}})
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config))
    checkpoint.save(tmp_path / "c", model, plain_data, ranking.catalogue(model)[1], {})
    timeless = evaluate(tmp_path / "c", settings=settings(baselines=(), hybrid=()), log=quiet)
    assert "test_at_unknown_time" not in timeless
