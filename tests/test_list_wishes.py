"""Lists that are to be diverse, or to hold few of a kind."""

from __future__ import annotations

import pytest
import tiny

from mvrec_core.attributes import OneOf
from mvrec_core.requests import Request


def ids(answer):
    return [item.item_id for item in answer.items]


def similarity(recommender, items):
    vectors = recommender._items[recommender._data.catalog.ids.index(items)]
    return float((vectors @ vectors.T).triu(1).sum())


@pytest.mark.parametrize("user", ["u003", None])
def test_diversity_takes_unlike_items_of_the_best(plain_recommender, ask, user):
    plain, diverse = ask(user, k=8), ask(user, k=8, diversity=0.9)
    assert len(diverse.items) == 8 and plain.items[0] == diverse.items[0]
    assert similarity(plain_recommender, ids(diverse)) < similarity(plain_recommender, ids(plain)) - 1
    assert {i.item_id: i.score for i in ask(user, k=34).items}[ids(diverse)[5]] == diverse.items[5].score
    assert [item.rank for item in diverse.items] == list(range(1, 9))


@pytest.mark.parametrize("user", ["u003", None])
def test_caps_are_kept_and_k_come_where_possible(ask, user):
    genres = {row["item_id"]: set(filter(None, row["genres"].split("|"))) for row in tiny.item_rows()}
    capped = ask(user, k=7, caps=(("genres", 2),))
    counts, wanted = {}, []
    for item in ids(ask(user, k=34)):  # in the order of the scores, by hand
        if len(wanted) < 7 and all(counts.get(genre, 0) < 2 for genre in genres[item]):
            wanted.append(item)
            counts |= {genre: counts.get(genre, 0) + 1 for genre in genres[item]}
    assert ids(capped) == wanted


def test_a_pool_too_small_for_the_caps_grows(plain_recommender, ask, monkeypatch):
    whole = ids(ask("u003", k=4, caps=(("genres", 1),), where=(OneOf("genres", None, frozenset({"Comedy"})),)))
    monkeypatch.setattr("mvrec_core.recommender._pool", lambda request: request.k)
    assert ids(ask("u003", k=4, caps=(("genres", 1),), where=(OneOf("genres", None, frozenset({"Comedy"})),))) == whole
    assert len(whole) >= 3


def test_a_cap_on_no_view_is_refused(ask):
    error = ask("u003", caps=(("genre", 2),))
    assert str(error) == "caps.genre: not a category view of items; did you mean 'genres'?"


def test_a_diverse_and_a_plain_request_in_one_batch(plain_recommender, ask):
    requests = [Request("u003", k=5), Request("u004", k=5, diversity=0.5), Request(None, k=3, caps=(("genres", 1),))]
    for request, answer in zip(requests, plain_recommender.recommend(requests), strict=True):
        assert ids(answer) == ids(plain_recommender.recommend([request])[0])


def test_similar_takes_the_wishes_of_a_request(plain_recommender):
    everything = [item.item_id for item in plain_recommender.similar("i03", Request(k=39))]
    dramas = {row["item_id"] for row in tiny.item_rows() if "Drama" in row["genres"]}
    drama = (OneOf("genres", frozenset({"Drama"})),)
    fit = [item for item in everything if item in dramas]
    found = plain_recommender.similar("i03", Request(k=5, where=drama, deny=frozenset({fit[0]})))
    assert [item.item_id for item in found] == fit[1:6]
    diverse = plain_recommender.similar("i03", Request(k=5, diversity=0.9))
    assert [item.item_id for item in diverse][0] == everything[0] and len(diverse) == 5
    assert similarity(plain_recommender, [item.item_id for item in diverse]) < similarity(
        plain_recommender, everything[:5]
    )
