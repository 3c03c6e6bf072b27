"""Items that are added, changed and removed while a model serves."""

from __future__ import annotations

import pytest
import tiny
import torch

from mvrec_core import checkpoint, graph, live_items
from mvrec_core.attributes import Between, OneOf
from mvrec_core.errors import RequestError
from mvrec_core.requests import Candidate, Event, Item, Request

NEW = Item("新片", {"title": "流浪地球 3", "genres": "科幻|灾难", "year": 2030})


def ids(recommender, *args, **kwargs):
    return [item.item_id for item in recommender.recommend([Request(*args, **kwargs)])[0].items]


@pytest.fixture
def with_new(plain_recommender):
    return plain_recommender.with_items([NEW], 1)


def test_a_new_item_can_be_ranked_at_once_and_the_old_recommender_does_not_know_it(plain_recommender, with_new):
    assert (plain_recommender.n_items, with_new.n_items) == (tiny.ITEMS, tiny.ITEMS + 1)
    assert (plain_recommender.items_version, with_new.items_version) == (0, 1)
    only = frozenset({"新片"})
    assert ids(with_new, "u003", allow=only) == ids(with_new, None, allow=only) == ["新片"]
    assert ids(plain_recommender, "u003", allow=only) == []


def test_its_score_is_that_of_its_features(plain_recommender, with_new):
    _, before, _ = plain_recommender.score(Request("u003"), [Candidate(features=NEW.features), Candidate("i30")])
    _, after, unknown = with_new.score(Request("u003"), [Candidate("新片"), Candidate("i30")])
    assert [one.score for one in after] == pytest.approx([one.score for one in before], abs=1e-4) and unknown == 0
    answer = with_new.recommend([Request("u003", k=tiny.ITEMS + 1)])[0]
    assert {item.item_id: item.score for item in answer.items}["新片"] == pytest.approx(after[0].score, abs=1e-4)
    assert {item.item_id: item.display for item in answer.items}["新片"] == "流浪地球 3"


def test_a_new_item_keeps_the_company_of_those_of_a_like_text(plain_data, tiny_encoder):
    config = tiny.config(tiny_encoder, "views.graph={kind: graph, size: 8}")
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config)).eval()
    model.refresh_texts()
    _, views = live_items.encode(model, plain_data, [{"title": "流浪地球 3"}, {"year": 1990}])
    k = model.item_view_names.index("graph")
    assert views.present[:, k].tolist() == [True, False]
    text, there = model.text(torch.arange(model.n_rows))
    near = (there & model.known & ~model.feature_graph[:, 0].isnan()).nonzero()[:, 0]
    alike = graph.alike(model.feature_graph[near, :8], text[near], near, model.text.embed(["title: 流浪地球 3"]))
    expected, _ = model.encoders["graph"](alike.repeat(1, 2))
    torch.testing.assert_close(views.z[0, k], expected[0], atol=1e-4, rtol=1e-4)
    assert model.feature_graph[there, 8:].isfinite().all() and model.feature_graph[~there, 8:].isnan().all()


def test_the_others_stay_as_they_are(plain_recommender, with_new):
    assert [item for item in ids(with_new, "u003", k=41) if item != "新片"] == ids(plain_recommender, "u003", k=40)


def test_filters_know_new_items_and_values_that_training_has_not_seen(with_new):
    assert ids(with_new, None, where=(OneOf("genres", frozenset({"灾难"})),)) == ["新片"]
    assert ids(with_new, None, where=(Between("year", 2025),)) == ["新片"]
    assert ids(with_new, None, k=2, caps=(("genres", 1),), where=(OneOf("genres", frozenset({"灾难"})),)) == ["新片"]


def test_a_new_item_is_a_step_of_a_history_and_is_not_repeated(plain_recommender, with_new):
    request = Request(None, (Event("新片"),), k=41)
    assert plain_recommender.recommend([request.__class__(None, (Event("新片"),))])[0].rung == "popularity"
    answer = with_new.recommend([request])[0]
    assert (answer.rung, answer.unknown_items) == ("history", 0)
    assert len(answer.items) == tiny.ITEMS and "新片" not in [item.item_id for item in answer.items]
    explained = with_new.recommend([Request(None, (Event("新片"), Event("i03")), k=2, explain=True)])[0]
    assert [event.item_id for event in explained.items[0].explanation.events] == ["新片", "i03"]
    assert [item.item_id for item in with_new.similar("新片", Request(k=3))] != []


def test_a_changed_item_keeps_its_id_and_takes_the_new_features(plain_recommender):
    row = tiny.item_rows()[10]
    same = {"title": row["title"], "genres": row["genres"], "year": int(row["year"])}
    changed = plain_recommender.with_items([Item("i10", same), Item("i11", same, "another title")], 1)
    assert changed.n_items == tiny.ITEMS and changed.item_ids == plain_recommender.item_ids
    wanted = [Candidate(f"i{n:02d}") for n in (9, 10, 11)]
    (before, after) = (one.score(Request("u003"), wanted)[1] for one in (plain_recommender, changed))
    assert [one.score for one in after[:2]] == pytest.approx([one.score for one in before[:2]], abs=1e-4)
    assert abs(after[2].score - before[2].score) > 1e-3 and abs(after[2].score - after[1].score) > 1e-3  # ids differ
    assert ids(changed, None, k=40) == ids(plain_recommender, None, k=40)  # as popular as before
    shown = {item.item_id: item.display for item in changed.recommend([Request(None, k=40)])[0].items}
    assert (shown["i10"], shown["i11"], shown["i12"]) == (row["title"], "another title", "film number 12")


def test_a_new_item_changes_too(with_new):
    again = with_new.with_items([Item("新片", {"title": "x", "year": 1950}), Item("i99", {"title": "y"})], 2)
    assert again.n_items == tiny.ITEMS + 2
    assert ids(again, None, where=(Between("year", None, 1960),)) == ["新片"]
    assert ids(with_new, None, where=(Between("year", None, 1960),)) == []


def test_a_removed_item_comes_no_more_but_stays_a_step(plain_recommender, with_new):
    less = with_new.with_items([Item("i03"), Item("新片"), Item("no such")], 2)
    assert less.n_items == tiny.ITEMS - 1 and not {"i03", "新片"} & set(ids(less, None, k=39))
    answer, before = (one.recommend([Request(None, (Event("i03"),), k=30)])[0] for one in (less, plain_recommender))
    assert (answer.rung, answer.unknown_items) == ("history", 0)
    assert [item.item_id for item in answer.items] == [item.item_id for item in before.items]
    _, scored, unknown = less.score(Request("u003"), [Candidate("i03"), Candidate("i04")])
    assert (scored[0].score, unknown) == (None, 1) and scored[1].score is not None
    assert "i03" not in [item.item_id for item in less.similar("i04", Request(k=38))]
    with pytest.raises(RequestError, match="'i03' is not in the catalogue"):
        less.similar("i03", Request(k=3))
    back = less.with_items([Item("i03", {"title": "back"})], 3)
    assert "i03" in ids(back, None, k=40)


def test_of_an_id_the_last_entry_counts(plain_recommender):
    both = [Item("i98", {"title": "first", "year": 1901}), Item("i98", {"title": "second", "year": 2101})]
    assert ids(plain_recommender.with_items(both, 1), None, where=(Between("year", 2100),)) == ["i98"]


def test_a_wrong_value_names_the_column(plain_recommender):
    with pytest.raises(RequestError, match="items: 'year': expected a number, found 'soon'") as error:
        plain_recommender.with_items([Item("i98", {"year": "soon"})], 1)
    assert error.value.field == "year"


def test_an_item_about_which_nothing_is_known(plain_recommender):
    assert ids(plain_recommender.with_items([Item("i98", {})], 1), None, k=41)[-1] == "i98"


def test_what_has_no_company_takes_that_of_items_of_a_like_text_when_training_is_over(plain_data, tiny_encoder):
    config = tiny.config(tiny_encoder, "views.graph={kind: graph, size: 8}")
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config))
    model.refresh_texts()
    model.feature_graph[5:9, :8] = torch.nan
    before = model.feature_graph.clone()
    alone = before[:, 0].isnan()
    model.complete()
    same = {"atol": 0, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(model.feature_graph[alone, :8], before[alone, 8:], **same)
    torch.testing.assert_close(model.feature_graph[~alone], before[~alone], **same)
    items = torch.tensor([10, 12])
    with model.as_if_new(items):
        torch.testing.assert_close(model.feature_graph[items, :8], before[items, 8:], **same)
        assert not model.known[items].any()
    torch.testing.assert_close(model.feature_graph[~alone], before[~alone], **same)
    assert model.known[items].all()
