from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch

from mvrec_core import checkpoint
from mvrec_core.answers import Answer
from mvrec_core.attributes import Between, OneOf
from mvrec_core.errors import CheckpointError, RequestError
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Candidate, Event, Request, read_texts
from mvrec_core.views import TextView

DEC_1 = 1_512_086_400.0


def ids(answer):
    return [item.item_id for item in answer.items]


@pytest.mark.parametrize("k", [0, -1, tiny.ITEMS + 1])
def test_a_bad_k_fails_alone(plain_recommender, k):
    good = Request("u003", k=5)
    first, bad, last = plain_recommender.recommend([good, Request("u004", k=k), good])
    assert isinstance(bad, RequestError) and bad.field == "k"
    assert str(bad) == f"k: expected 1 to 40, the size of the catalogue, found {k}"
    assert isinstance(first, Answer) and first == last and len(first.items) == 5


def test_an_answer_is_ranked_from_1_by_score(ask):
    answer = ask("u003", k=10)
    scores = [item.score for item in answer.items]
    assert answer.rung == "history" and answer.unknown_items == 0
    assert scores == sorted(scores, reverse=True) and len(set(ids(answer))) == 10
    assert [item.rank for item in answer.items] == list(range(1, 11))


@pytest.mark.parametrize(("k", "count"), [(3, 3), (tiny.ITEMS, tiny.ITEMS - 6)])
def test_k_items_or_as_many_as_there_are(ask, k, count):
    assert len(tiny.history_of("u003")) == 6 and len(ask("u003", k=k).items) == count


def test_together_and_alone_is_the_same(plain_recommender):
    requests = [Request("u003", k=4), Request("nobody-knows", k=7), Request("u011", (Event("i30"),), k=2)]
    for request, answer in zip(requests, plain_recommender.recommend(requests), strict=True):
        (alone,) = plain_recommender.recommend([request])
        assert (alone.rung, ids(alone)) == (answer.rung, ids(answer))
        assert [i.score for i in alone.items] == pytest.approx([i.score for i in answer.items], abs=1e-4)


# what an answer rests on


def test_an_unknown_user_gets_what_is_popular(ask, plain_data, plain_config):
    histories = plain_data.histories(plain_config)
    train = [f"i{item - 2:02d}" for item in histories.item[histories.split == 0] if item >= 2]
    order = sorted({f"i{n:02d}" for n in range(tiny.ITEMS)}, key=lambda item: (-train.count(item), item))
    answer = ask("nobody-knows", k=10)
    assert (answer.rung, ids(answer)) == ("popularity", order[:10])
    assert answer.items[0].score == pytest.approx(train.count(order[0]) / len([*train, *"gn"]), rel=0.02)


@pytest.mark.parametrize(
    ("user", "events", "rung"),
    [
        ("u003", (), "history"),
        ("ghost", (), "profile"),
        ("nobody", (), "popularity"),
        (None, (), "popularity"),
        (None, (Event("i03"),), "history"),
        (None, (Event("no-such"),), "popularity"),
        ("ghost", (Event("i03"),), "history"),
    ],
)
def test_rungs(ask, user, events, rung):
    assert ask(user, events).rung == rung


def test_unknown_items_of_the_request_are_counted(ask):
    assert ask(None, (Event("x"), Event("i03"), Event("y"))).unknown_items == 2
    assert ask("ghost").unknown_items == 0  # its stored event is not the request's


# filters


@pytest.mark.parametrize("seen", [True, False])
def test_seen_items_are_left_out_as_evaluation_has_it_unless_the_request_says(plain_checkpoint, seen):
    recommender = Recommender.load(plain_checkpoint)
    evaluate = recommender.config.evaluate.model_copy(update={"exclude_seen": seen})
    recommender.config = recommender.config.model_copy(update={"evaluate": evaluate})
    requests = [Request("u003", k=tiny.ITEMS, exclude_seen=asked) for asked in (None, True, False)]
    assert [len(answer.items) for answer in recommender.recommend(requests)] == [
        tiny.ITEMS - 6 * seen,
        tiny.ITEMS - 6,
        tiny.ITEMS,
    ]


def test_seen_items_do_not_come_again_unless_wanted(ask):
    seen = set(tiny.history_of("u003"))
    assert not seen & set(ids(ask("u003", k=34)))
    assert seen < set(ids(ask("u003", k=40, exclude_seen=False)))


def test_events_of_the_request_are_seen_too(ask):
    assert "i30" in ids(ask("u003", k=34)) and "i30" not in ids(ask("u003", (Event("i30"),), k=40))


def test_popularity_filters_too(ask):
    answer = ask(None, k=40, deny=frozenset({"i01"}), allow=frozenset({"i01", "i02", "no-such"}))
    assert (answer.rung, ids(answer)) == ("popularity", ["i02"])


def test_allow_and_deny(ask):
    allow = frozenset({"i30", "i31", "i32", "i33"})
    answer = ask("u003", k=3, allow=allow, deny=frozenset({"i31"}))
    assert set(ids(answer)) == {"i30", "i32", "i33"}
    assert ids(ask("u003", allow=frozenset())) == []


def by_rule(rule):
    return {row["item_id"] for row in tiny.item_rows() if rule(row["genres"].split("|"), row["year"])}


@pytest.mark.parametrize("user", ["u003", None])
def test_conditions_come_before_the_best_k_so_that_k_come(ask, user):
    where = (OneOf("genres", frozenset({"科幻"}), frozenset({"Drama"})), Between("year", 1985, 2015))
    fit = by_rule(
        lambda genres, year: "科幻" in genres and "Drama" not in genres and year and 1985 <= int(year) <= 2015
    )
    assert len(fit) >= 8 and set(ids(ask(user, k=40, where=where, exclude_seen=False))) == fit
    left = fit - set(tiny.history_of("u003")) if user else fit
    best = [item for item in ids(ask(user, k=34)) if item in left]
    assert ids(ask(user, k=4, where=where)) == best[:4]


def test_requests_of_a_batch_keep_their_own_conditions(plain_recommender):
    drama, late = OneOf("genres", frozenset({"Drama"})), Between("year", None, 1999)
    wheres = [(), (drama,), (drama, late), (OneOf("genres", frozenset({"Western"})),), (drama,)]
    answers = plain_recommender.recommend([Request("u003", k=5, where=where) for where in wheres])
    for answer, where in zip(answers, wheres, strict=True):
        assert ids(answer) == ids(plain_recommender.recommend([Request("u003", k=5, where=where)])[0])
    assert len({tuple(ids(answer)) for answer in answers}) == 4 and ids(answers[3]) == []


def test_a_condition_on_no_view_fails_alone(plain_recommender):
    good, bad = plain_recommender.recommend([Request("u003"), Request("u003", where=(OneOf("genre"),))])
    assert isinstance(good, Answer) and isinstance(bad, RequestError) and bad.field == "filter.categories.genre"


# events of the request


def test_an_event_of_the_request_counts(ask):
    stored = tiny.history_of("u003")
    last = int(stored[-1][1:])
    far = f"i{(last + 20) % tiny.ITEMS:02d}"
    before, after = ask("u003", k=34), ask("u003", (Event(far, DEC_1, {"rating": 5}),), k=34)
    assert ids(before) != ids(after)


def test_a_history_sent_is_as_good_as_a_history_stored(plain_recommender, plain_data):
    row = plain_data.users["user_id"].to_pylist().index("ghost")
    assert plain_data.users["user.gender"][row].as_py() == ["F"]
    stored = [r for r in tiny.event_rows() if r["user_id"] == "u006"]  # gender F as well
    events = tuple(
        Event(r["item_id"], float(r["timestamp"]), {"rating": float(r["rating"])} if r["rating"] else {})
        for r in stored
    )
    histories, _ = plain_recommender._users([Request("u006"), Request(None, events)])
    half = histories.offsets[1]
    assert histories.item[:half].tolist() == histories.item[half:].tolist()
    assert histories.time[:half].tolist() == histories.time[half:].tolist()
    torch.testing.assert_close(
        torch.tensor(histories.event["rating"][:half]), torch.tensor(histories.event["rating"][half:]), equal_nan=True
    )


def test_a_rating_that_is_no_number(plain_recommender):
    with pytest.raises(RequestError, match="'rating': expected a number, found 'good'"):
        plain_recommender._users([Request(None, (Event("i03", None, {"rating": "good"}),))])


def test_a_bad_event_value_fails_alone(plain_recommender):
    bad = Request(None, (Event("i03", None, {"rating": "good"}),))
    answers = plain_recommender.recommend([Request("u003"), bad])
    assert isinstance(answers[0], Answer) and isinstance(answers[1], RequestError)


# explain and display


def test_views_explain_where_asked(ask):
    assert ask("u003").items[0].explanation is None and ask("u003").views is None
    for item in ask("u003", k=34, explain=True).items:
        views = item.explanation.views
        assert list(views) == ["id", "text", "genres", "year"]
        assert sum(views.values()) == pytest.approx(1, abs=1e-5)
        assert (views["text"] == 0) == (item.item_id == tiny.NO_TEXT)


def test_titles_are_shown_as_they_are(ask):
    shown = {item.item_id: item.display for item in ask(None, k=40).items}
    assert (shown["i00"], shown["i01"], shown[tiny.NO_TEXT]) == ("流浪地球", "قصة لعبة", None)


# score


def test_a_score_is_that_of_the_list(plain_recommender, ask):
    answer = ask("u003", k=34)
    rung, scored, unknown = plain_recommender.score(Request("u003"), [Candidate(item) for item in ids(answer)])
    assert (rung, unknown) == ("history", 0)
    assert [one.score for one in scored] == pytest.approx([item.score for item in answer.items], abs=1e-4)
    assert all(one.probability == pytest.approx(1 / (1 + math.exp(-one.score)), abs=1e-5) for one in scored)


def test_a_candidate_that_is_unknown_has_no_score(plain_recommender):
    _, scored, _ = plain_recommender.score(Request("u003"), [Candidate("x"), Candidate("i30")])
    assert (scored[0].score, scored[0].probability) == (None, None) and scored[1].score is not None


def test_a_new_item_is_scored_by_what_it_is(plain_recommender):
    features = [
        {"title": "film number 12", "genres": "Drama|Comedy", "year": 1992},
        {"title": "流浪地球 2", "genres": ["科幻"]},
        {"genres": "never heard of"},
        {},
    ]
    rung, scored, _ = plain_recommender.score(Request("u003"), [Candidate(features=f) for f in features])
    assert rung == "history" and all(math.isfinite(one.score) and 0 <= one.probability <= 1 for one in scored)
    assert len({one.score for one in scored[:2]}) == 2


def test_a_new_item_of_a_wrong_type_names_the_column(plain_recommender):
    with pytest.raises(RequestError, match="candidates: 'year': expected a number, found 'soon'") as error:
        plain_recommender.score(Request("u003"), [Candidate(features={"year": "soon"})])
    assert error.value.field == "year"


def test_scores_of_nobody_are_popularity(plain_recommender, ask):
    best = ask(None, k=1).items[0]
    rung, scored, _ = plain_recommender.score(Request(), [Candidate(best.item_id), Candidate(features={"title": "a"})])
    assert rung == "popularity" and scored[0].score == pytest.approx(best.score) and scored[1].score is None


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"title": " A ", "genres": ["x", "y"]}, "title: A genres: x, y"),
        ({"title": "", "genres": "科幻"}, "genres: 科幻"),
        ({"title": "Caf\u0065\u0301 &amp; \u7535\u5f71\x00"}, "title: Café & 电影"),
        ({"year": 3}, None),
    ],
)
def test_texts_of_features_read_as_prepared_ones(row, text):
    assert read_texts([row], TextView(kind="text", columns=("title", "genres"))) == [text]


# similar, history, users


def test_similar_is_by_cosine_without_the_item_itself(plain_recommender, plain_checkpoint):
    vectors = checkpoint.load(plain_checkpoint).item_vectors[2:]
    by_hand = (vectors[3] @ vectors.T).masked_fill(torch.arange(tiny.ITEMS) == 3, -9).topk(5)
    found = plain_recommender.similar("i03", Request(k=5))
    assert [item.item_id for item in found] == [f"i{n:02d}" for n in by_hand.indices.tolist()]
    assert [item.score for item in found] == pytest.approx(by_hand.values.tolist(), abs=1e-5)
    assert len(plain_recommender.similar("i03", Request(k=tiny.ITEMS))) == tiny.ITEMS - 1


def test_similar_to_nothing(plain_recommender):
    with pytest.raises(RequestError, match="'x' is not in the catalogue") as error:
        plain_recommender.similar("x", Request(k=3))
    assert (error.value.status, error.value.field) == (404, "item_id")


def test_a_history_is_newest_first(plain_recommender):
    rows = [row for row in tiny.event_rows() if row["user_id"] == "u003"]
    got = plain_recommender.history("u003", 4)
    assert [(e["item_id"], e["timestamp"]) for e in got] == [
        (row["item_id"], float(row["timestamp"])) for row in rows[::-1][:4]
    ]
    assert plain_recommender.history("ghost", 9) == [
        {"item_id": "gone", "display": None, "timestamp": float(tiny.START), "live": False}
    ]
    with pytest.raises(RequestError, match="'x' is not known"):
        plain_recommender.history("x", 3)


def test_users_by_prefix(plain_recommender):
    assert plain_recommender.users("u00", 3) == ["u000", "u001", "u002"]
    assert plain_recommender.users("short", 9) == list(tiny.SHORT) and plain_recommender.users("zz", 9) == []


# nothing


def test_a_recommender_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        Recommender.load(tmp_path / "none")


def test_a_request_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request("a").k = 3
