"""Live events of a user, and the moment at which somebody asks."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from mvrec_core.errors import RequestError
from mvrec_core.requests import Candidate, Event, Request

DEC_1 = 1_512_086_400.0


def ids(answer):
    return [item.item_id for item in answer.items]


def test_live_events_are_those_between_the_stored_and_the_request(ask):
    live = (Event("i30", DEC_1, {"rating": 4}), Event("no such item", DEC_1 + 1))
    last = Event("i31", DEC_1 + 2)
    assert ids(ask("u003", live=live, k=9)) == ids(ask("u003", live, k=9)) != ids(ask("u003", k=9))
    assert ids(ask("u003", (last,), live=live, k=9)) == ids(ask("u003", (*live, last), k=9))
    assert ask("u003", (last, Event("没有")), live=live).unknown_items == 1  # of the request alone


def test_live_events_make_a_stranger_known(ask):
    answer = ask("陌生人", live=(Event("i30", DEC_1),), k=40)
    assert answer.rung == "history" and "i30" not in ids(answer)
    assert ids(answer) == ids(ask(None, (Event("i30", DEC_1),), k=40))


def test_what_a_newer_model_has_learnt_is_not_live_any_more(ask, plain_recommender):
    stored = [row for row in tiny.event_rows() if row["user_id"] == "u003"]
    learnt = tuple(Event(row["item_id"], float(row["timestamp"])) for row in stored[-2:])
    new = Event("i30", DEC_1)
    assert ask("u003", live=(*learnt, new), k=9) == ask("u003", live=(new,), k=9)
    history = plain_recommender.history("u003", 100, (*learnt, new))
    assert [(e["item_id"], e["live"]) for e in history[:2]] == [("i30", True), (stored[-1]["item_id"], False)]
    assert len(history) == len(stored) + 1


def test_live_events_that_this_model_cannot_read_are_left_out(ask, plain_recommender):
    good, bad = Event("i30", DEC_1), Event("i31", DEC_1 + 1, {"rating": "十分"})
    assert ask("u003", live=(good, bad), k=9) == ask("u003", live=(good,), k=9)
    with pytest.raises(RequestError, match="'rating': expected a number"):
        plain_recommender.unknown_items([good, bad])
    assert plain_recommender.unknown_items([good, Event("没有")]) == 1


@pytest.mark.parametrize(("after", "told"), [(-9, 0), (0, 0), (1, 1), (63, 32), (64, 64), (100_000, 65_536)])
def test_the_clock_is_read_in_the_steps_that_the_model_tells_apart(plain_recommender, after, told):
    last = 2e9
    asked = Request("u003", live=(Event("i30", 1e9), Event("i31", last)), now="clock")
    assert plain_recommender.moment(asked, last + after) == last + told
    exact = plain_recommender.recommend([dataclasses.replace(asked, now=last + after)])
    assert plain_recommender.recommend([dataclasses.replace(asked, now=last + told)]) == exact


def test_whose_last_event_has_no_time_is_asked_for_at_no_time(plain_recommender):
    stored = plain_recommender.moment(Request("u003", now="clock"), 3e9)
    assert stored is not None and 1.5e9 < stored <= 3e9
    timeless = (Request("u003", (Event("i30"),), now="clock"), Request("nobody-knows", now="clock"), Request("u003"))
    assert [plain_recommender.moment(request, 3e9) for request in timeless] == [None, None, None]


def test_score_and_history_know_live_events(plain_recommender):
    live = (Event("i30", DEC_1),)
    request, candidates = Request("陌生人", live=live), [Candidate("i31")]
    assert plain_recommender.score(request, candidates)[0] == "history"
    assert plain_recommender.history("陌生人", 5, live) == [
        {"item_id": "i30", "display": "film number 30", "timestamp": DEC_1, "live": True}
    ]
