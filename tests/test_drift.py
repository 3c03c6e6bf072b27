from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mvrec_core import checkpoint as checkpoints
from mvrec_core.drift import LEAST_RECENT, Bins, Recent, Reference
from mvrec_core.recommender import Recommender
from mvrec_core.reference import reference
from mvrec_core.requests import Event, Request


def test_the_index_is_that_of_the_formula():
    bins = Bins.of(np.arange(100))
    assert len(bins.edges) == 9 and bins.shares == pytest.approx([0.1] * 10, abs=0.011)
    places = [0] * 50 + [1] * 10 + [2] * 40
    seen = np.array([0.5, 0.1, 0.4] + [1e-4] * 7)
    expected = ((seen - bins.shares) * np.log(seen / bins.shares)).sum()
    assert bins.psi(places) == pytest.approx(expected)


def test_it_is_small_for_the_same_and_large_for_another_distribution():
    draw = np.random.default_rng(0)
    recent = [Recent(Bins.of(draw.normal(size=5000))) for _ in range(3)]
    for one, shift in zip(recent, (0.0, 0.1, 1.0), strict=True):
        for value in draw.normal(shift, size=2000):
            one.add(value)
    same, little, much = (one.psi() for one in recent)
    assert same < 0.02 < 0.25 < much and same < little < much


def test_a_constant_has_two_bins_and_few_values_no_index():
    recent = Recent(Bins.of([0.25] * 10))
    assert recent.bins == Bins([0.25], [0.0, 1.0])
    for _ in range(LEAST_RECENT - 1):
        recent.add(0.25 + 1e-6)
    assert recent.psi() is None
    recent.add(0.25)
    assert recent.psi() == pytest.approx(0.0, abs=1e-2)


def test_the_reference_is_what_the_recommender_gives_on_validation_users(plain_recommender, plain_data, plain_config):
    found = reference(plain_recommender._model, plain_data.shards(plain_config), plain_config)
    examples, rows = plain_recommender.stored.best_rows("valid", 1)
    assert found.users == len(examples)
    assert set(found.scores) == {"score", "score_at_now"}
    weights = plain_recommender.stored.view_weights("valid")[1]
    assert set(found.weights) == set(weights[0])
    assert found.weights["text"] == Bins.of([one["text"] for one in weights if one])


def test_a_checkpoint_keeps_it_and_one_without_still_loads(plain_checkpoint, plain_data, plain_config, tmp_path):
    loaded = checkpoints.load(plain_checkpoint)
    assert loaded.reference is None
    found = reference(loaded.model, plain_data.shards(plain_config), plain_config)
    target = tmp_path / "with"
    checkpoints.save(target, loaded.model, plain_data, loaded.item_vectors, {}, reference=found)
    assert checkpoints.load(target).reference == found == Reference.load(target / "reference.json")
    damaged = shutil.copytree(target, tmp_path / "damaged")
    (damaged / "reference.json").write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match="reference.json"):
        checkpoints.load(damaged)


def test_keys_are_not_written_into_a_checkpoint(plain_checkpoint, plain_data, tmp_path):
    model = checkpoints.load(plain_checkpoint).model
    model.config = model.config.model_copy(
        update={"serve": model.config.serve.model_copy(update={"api_keys": "not-a-path-but-a-secret"})}
    )
    checkpoints.save(tmp_path / "c", model, plain_data, checkpoints.load(plain_checkpoint).item_vectors, {})
    assert "not-a-path" not in (tmp_path / "c" / "config.json").read_text()
    assert json.loads((tmp_path / "c" / "config.json").read_text())["serve"]["cache_mb"] == 64


def test_missing_views_of_a_served_history(plain_recommender: Recommender):
    events = (Event("i07", 2e9, {"rating": 4.0}), Event("i30", 2e9 + 1))  # i07 has no text and no genre
    use = plain_recommender.view_use(Request(events=events))
    assert (use.missing["text"], use.missing["rating"], use.missing["id"]) == (0.5, 0.5, 0.0)
    assert use.missing["gender"] == 1.0 and sum(use.weights.values()) == pytest.approx(1)
    assert plain_recommender.view_use(Request("u003")).missing["gender"] == 0.0
    assert plain_recommender.view_use(Request("没有")).weights == {}
