"""Whether an explanation is true: what it adds up to, what moves a score, what a rank would be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from mvrec_core import checkpoint, explanations, ranking
from mvrec_core.batch import collate
from mvrec_core.explanations import Explanation, attribute, mean_item, user_weights
from mvrec_core.model import ItemViews
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Event, Request
from mvrec_core.sequences import live_examples

VIEWS = ["id", "text", "genres", "year"]


@pytest.fixture
def explained(plain_recommender):
    def one(*args, **kwargs):
        return plain_recommender.recommend([Request(*args, explain=True, **kwargs)])[0]

    return one


def total(why: Explanation) -> float:
    return why.baseline + sum(event.score for event in why.events)


@pytest.mark.parametrize("user", ["u003", "u011", "short0"])
def test_the_contributions_and_the_baseline_are_the_score(explained, user):
    for item in explained(user, k=20).items:
        why = item.explanation
        size = sum(abs(event.score) for event in why.events)
        assert size > 0.01 and abs(item.score - total(why)) < 0.01 * size + 2e-4
        assert item.score == pytest.approx(total(why) + why.error, abs=2e-4)
        for event in why.events:
            assert sum(event.views.values()) == pytest.approx(event.score, abs=1e-5)


def test_the_events_are_those_that_the_model_reads_oldest_first(explained, plain_config):
    rows = [row for row in tiny.event_rows() if row["user_id"] == "u011"]
    assert len(rows) > plain_config.model.max_len
    events = explained("u011", k=1).items[0].explanation.events
    wanted = [(row["item_id"], float(row["timestamp"])) for row in rows[-plain_config.model.max_len :]]
    assert [(event.item_id, event.timestamp) for event in events] == wanted
    titles = {row["item_id"]: row["title"] or None for row in tiny.item_rows()}
    assert [event.display for event in events] == [titles[item] for item, _ in wanted]


def test_an_event_of_no_known_item_is_left_out_and_the_rest_still_adds_up(explained):
    item = explained(None, events=(Event("i03"), Event("never heard of"), Event("i30")), k=1).items[0]
    assert [event.item_id for event in item.explanation.events] == ["i03", "i30"]
    assert item.score == pytest.approx(total(item.explanation) + item.explanation.error, abs=2e-4)


def test_a_view_that_an_event_lacks_adds_nothing(explained):
    (event,) = explained(None, events=(Event(tiny.NO_TEXT),), k=1).items[0].explanation.events
    assert event.views["text"] == 0 == event.views["genres"] and event.views["id"] != 0


def test_an_event_of_the_mean_item_adds_nothing(plain_model, plain_data, plain_config):
    views, items = ranking.catalogue(plain_model)
    histories = plain_data.histories(plain_config)
    batch = collate(histories, live_examples(histories, 8)[np.array([3])])
    mean = ItemViews(views.z.clone(), torch.ones_like(views.present))
    mean = replace(mean, z=mean.z.index_put((batch.item[0, 2],), mean_item(mean)))
    for _ in range(50):  # the mean of the others and of itself
        mean.z[batch.item[0, 2]] = mean_item(mean)
    found = attribute(plain_model, batch, mean, items[None, [5, 9]]).contribution[0]
    assert found[:, 2].abs().max() < 1e-6 < found[:, 1].abs().min()


def test_the_batch_does_not_change_an_explanation(plain_recommender):
    requests = [Request("u003", k=3, explain=True), Request("u004", k=2), Request("u011", k=5, explain=True)]
    together = plain_recommender.recommend(requests)
    assert together[1].items[0].explanation is None and together[1].views is None
    for place in (0, 2):
        alone = plain_recommender.recommend([requests[place]])[0]
        assert len(alone.items) == len(together[place].items)
        for one, other in zip(alone.items, together[place].items, strict=True):
            assert one.explanation.ranks == other.explanation.ranks
            assert [e.score for e in one.explanation.events] == pytest.approx(
                [e.score for e in other.explanation.events], abs=1e-4
            )


def test_nodes_are_doubled_until_the_error_is_small(plain_model, plain_data, plain_config, monkeypatch):
    views, items = ranking.catalogue(plain_model)
    histories = plain_data.histories(plain_config)
    batch = collate(histories, live_examples(histories, 8)[np.arange(20)])
    chosen = items[torch.arange(2, 12)].expand(20, 10, -1)
    monkeypatch.setattr(explanations, "MOST_NODES", 1)
    rough = attribute(plain_model, batch, views, chosen, nodes=1).error.abs().max()
    monkeypatch.setattr(explanations, "MOST_NODES", 64)
    found = attribute(plain_model, batch, views, chosen, nodes=1)
    assert rough > 2 * found.error.abs().max()
    assert (found.error.abs() <= 0.01 * found.contribution.abs().sum((-1, -2)) + 1e-4).all()


def test_popularity_rests_on_no_event_and_no_view(explained):
    answer = explained(None, k=3)
    assert answer.rung == "popularity" and answer.views == {}
    for item in answer.items:
        why = item.explanation
        assert (why.baseline, why.events, why.error, why.ranks) == (item.score, [], 0, {})
        assert sum(why.views.values()) == pytest.approx(1, abs=1e-5)


def test_explaining_changes_no_answer_and_leaves_no_gradients(plain_recommender, explained):
    plain, why = plain_recommender.recommend([Request("u003", k=9)])[0], explained("u003", k=9)
    assert [(i.item_id, i.score) for i in plain.items] == [(i.item_id, i.score) for i in why.items]
    assert all(parameter.grad is None for parameter in plain_recommender._model.parameters())


# ranks without a view


def test_the_ranks_are_those_of_a_model_that_lacks_the_view(plain_recommender, explained):
    """By a second road: the catalogue's own presence is emptied, and the list asked for again."""
    answer = explained("u003", k=12)
    blind = object.__new__(Recommender)
    blind.__dict__.update(plain_recommender.__dict__)
    there = plain_recommender._views.present.clone()
    there[:, VIEWS.index("genres")] = False
    blind._views = ItemViews(plain_recommender._views.z, there)
    blind._items = plain_recommender._model.item_vectors(blind._views)[0].detach()
    blind._encodings = {}  # what is remembered was encoded with the view
    order = [item.item_id for item in blind.recommend([Request("u003", k=40)])[0].items]
    ranks = [item.explanation.ranks["genres"] for item in answer.items]
    assert ranks == [1 + order.index(item.item_id) for item in answer.items]
    assert ranks != [item.rank for item in answer.items]


def test_every_view_has_its_rank_and_filters_hold(explained):
    answer = explained("u003", k=3, allow=frozenset({"i30", "i31", "i32"}))
    for item in answer.items:
        assert list(item.explanation.ranks) == [*VIEWS, "rating", "time", "gender"]
    for view in (*VIEWS, "rating", "time", "gender"):
        assert sorted(item.explanation.ranks[view] for item in answer.items) == [1, 2, 3]


# the user's weights


def test_the_users_weights_are_a_mean_over_steps(explained, plain_recommender):
    weights = explained("u003", k=1).views
    assert list(weights) == [*VIEWS, "rating", "time"] and sum(weights.values()) == pytest.approx(1, abs=1e-5)
    (once,) = (explained(None, events=(Event(tiny.NO_TEXT, 5.0, {"rating": 2}),), k=1).views,)
    assert once["text"] == once["genres"] == 0 and min(once["id"], once["year"], once["rating"], once["time"]) > 0
    assert explained(None, events=(Event(tiny.NO_TEXT),), k=1).views["rating"] == 0


def test_a_padded_step_counts_for_nothing(plain_recommender):
    histories, model, views = plain_recommender.histories, plain_recommender._model, plain_recommender._views
    examples = live_examples(histories, 8)
    short = int(np.argmin(examples.stop))
    together = user_weights(model, histories, examples[np.array([short, 11])], views)[0]
    assert together == pytest.approx(user_weights(model, histories, examples[np.array([short])], views)[0], abs=1e-6)


# the source formulation


def test_linear_fusion_is_explained_too(plain_config, plain_data, tmp_path):
    config = plain_config.model_copy(update={"model": plain_config.model.model_copy(update={"fusion": "linear"})})
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config))
    model.text.refresh()
    checkpoint.save(tmp_path / "linear", model, plain_data, ranking.catalogue(model)[1], {"valid": {}})
    answer = Recommender.load(tmp_path / "linear").recommend([Request("u003", k=5, explain=True)])[0]
    for item in answer.items:
        assert item.score == pytest.approx(total(item.explanation) + item.explanation.error, abs=5e-4)
        assert set(item.explanation.ranks) >= set(VIEWS)
