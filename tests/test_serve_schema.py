"""The routes in one process: what a body may hold, what every mistake is answered with."""

from __future__ import annotations

import json
import time

import pytest
from shelf import TITLES, error
from starlette.testclient import TestClient

from mvrec_core.attributes import Between, OneOf
from mvrec_core.requests import Candidate, Event, Item, Request
from serve.api import create_api
from serve.schema import RecommendBody, ScoreBody


def test_a_body_becomes_a_request():
    body = {
        "user_id": 196,
        "events": [{"item_id": 50, "timestamp": "1997-12-04T15:55:49Z", "rating": 4}, {"item_id": "x"}],
        "k": 3,
        "exclude_seen": False,
        "filter": {
            "allow": [1, "b"],
            "deny": ["c"],
            "categories": {"genres": {"any": ["科幻", 7], "none": ["x"]}, "shop": {}},
            "ranges": {"year": {"min": 1990, "max": 1999.5}},
        },
        "diversity": 0.25,
        "caps": {"genres": 2},
        "explain": True,
        "now": "1997-12-05T00:00:00Z",
    }
    assert RecommendBody.model_validate(body).request() == Request(
        user_id="196",
        events=(Event("50", 881250949.0, {"rating": 4}), Event("x")),
        k=3,
        exclude_seen=False,
        allow=frozenset({"1", "b"}),
        deny=frozenset({"c"}),
        where=(
            OneOf("genres", frozenset({"科幻", "7"}), frozenset({"x"})),
            OneOf("shop"),
            Between("year", 1990, 1999.5),
        ),
        diversity=0.25,
        caps=(("genres", 2),),
        explain=True,
        now=881280000.0,
    )


def test_what_is_absent_has_the_default():
    assert RecommendBody.model_validate({}).request() == Request(now="clock")


@pytest.mark.parametrize(("given", "now"), [("clock", "clock"), (None, None), ("1970-01-01T00:00:09Z", 9.0), (9, 9.0)])
def test_when_it_is_asked(given, now):
    assert RecommendBody.model_validate({"now": given}).request().now == now


@pytest.mark.parametrize(("given", "text"), [(196, "196"), ("0196", "0196"), (196.0, "196"), (-3, "-3"), ("文", "文")])
def test_an_id_is_text(given, text):
    assert RecommendBody.model_validate({"user_id": given}).request().user_id == text


def test_candidates():
    body = {"user_id": "u", "candidates": [{"item_id": 1}, {"features": {"title": "Alien", "year": 1979}}]}
    request, candidates = ScoreBody.model_validate(body).request()
    assert request == Request(user_id="u", now="clock")
    assert candidates == (Candidate("1"), Candidate(features={"title": "Alien", "year": 1979}))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (5, 5.0),
        (5.5, 5.5),
        (-1, -1.0),
        ("1970-01-01", 0.0),
        ("1970-01-01T02:00:00+02:00", 0.0),
        ("1970-01-01T00:00:01", 1.0),
    ],
)
def test_timestamps(given, seconds):
    body = RecommendBody.model_validate({"events": [{"item_id": "a", "timestamp": given}]})
    assert body.request().events[0].timestamp == seconds


def test_recommend(client):
    response = client.post("/v1/recommend", json={"user_id": "ann", "k": 2, "explain": True})
    views = {"id": 0.25, "text": 0.75}
    reasons = [
        {
            "item_id": item,
            "display": TITLES[item],
            "timestamp": 8.0 + place,
            "score": 0.5 - place / 8,
            "views": {"id": 0.5, "text": -place / 8},
            "again": 0.0,
        }
        for place, item in ((0, "a"), (8, "c"), (1, "b"), (7, "b"), (2, "c"))
    ]
    why = {"views": views, "events": reasons, "others": -0.25, "baseline": 0.5, "ranks": {"id": 3, "text": 1}}
    assert response.json() == {
        "model_version": "shelf-1",
        "rung": "history",
        "items": [
            {"item_id": "a", "score": 3.0, "rank": 1, "display": "霸王别姬", **why},
            {"item_id": "b", "score": 2.0, "rank": 2, "display": "المومياء", **why},
        ],
        "unknown_items": 0,
        "views": views,
    }
    assert "霸王别姬" in response.content.decode("utf-8")  # not \u escapes


def test_views_only_where_asked_and_unknown_items_counted(client):
    answer = client.post("/v1/recommend", json={"events": [{"item_id": "zz"}, {"item_id": "a"}], "k": 1}).json()
    assert answer["items"] == [{"item_id": "a", "score": 3.0, "rank": 1, "display": "霸王别姬"}]
    assert (answer["rung"], answer["unknown_items"]) == ("popularity", 1)


@pytest.mark.parametrize(
    "kind", [None, "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"]
)
def test_the_content_type_does_not_matter(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert client.post("/v1/recommend", content=b'{"user_id":"ann","k":1}', headers=headers).json()["rung"] == "history"


def test_score(client):
    body = {"user_id": "ann", "candidates": [{"item_id": "a"}, {"item_id": "zz"}, {"features": {"title": "?"}}]}
    assert client.post("/v1/score", json=body).json() == {
        "model_version": "shelf-1",
        "rung": "history",
        "candidates": [
            {"item_id": "a", "score": 0.0, "probability": 0.5},
            {"item_id": "zz", "score": None, "probability": None},
            {"item_id": None, "score": 0.0, "probability": 0.5},
        ],
        "unknown_items": 1,
    }


def test_items_are_put_and_removed(client, shelf):
    new = {"item_id": 9, "features": {"title": "红楼梦", "year": 1987, "genres": ["剧情"]}}
    answer = client.put("/v1/items", json={"items": [new, {"item_id": "x", "features": {}, "display": "X"}]})
    assert answer.json() == {"model_version": "shelf-1", "items_version": 1, "items": 5}
    assert shelf.items == (Item("9", new["features"]), Item("x", {}, "X"))
    assert client.delete("/v1/items/a").json()["items"] == 2
    assert client.delete("/v1/items?item_id=a&item_id=b").json()["items"] == 1
    assert error(client.delete("/v1/items/x%2Fy")) == (404, "not_found", "item_id")
    assert error(client.delete("/v1/items/x%0Ay")) == (404, "not_found", "item_id")
    assert error(client.delete("/v1/items")) == (422, "invalid_request", "item_id")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"items": []}, "items"),
        ({"items": [{"item_id": "a"}]}, "items.0.features"),
        ({"items": [{"item_id": "a", "features": {"title": "\ud800"}}]}, "items.0.features"),
        ({"items": [{"item_id": "a", "features": {}, "titel": "A"}]}, "items.0.titel"),
        ({"items": [{"item_id": "a", "features": {}}] * 201}, "items"),
    ],
)
def test_mistakes_in_items(client, body, field):
    assert error(client.put("/v1/items", content=json.dumps(body))) == (422, "invalid_request", field)


def test_similar_users_and_history(client):
    assert [item["item_id"] for item in client.get("/v1/similar/a?k=1").json()["items"]] == ["b"]
    body = {"item_id": "a", "filter": {"deny": ["b"]}, "diversity": 0.5}
    assert [item["item_id"] for item in client.post("/v1/similar", json=body).json()["items"]] == ["c"]
    assert client.get("/v1/users", params={"prefix": "安"}).json() == {"users": ["安"]}
    assert client.get("/v1/users/ann/history").json() == {
        "user_id": "ann",
        "events": [{"item_id": "b", "display": "المومياء", "timestamp": 881250949.0, "live": False}],
    }
    assert error(client.get("/v1/similar/zz")) == (404, "not_found", "item_id")
    assert error(client.get("/v1/similar/x%2Fy")) == (404, "not_found", "item_id")  # an id may hold a slash
    assert error(client.get("/v1/users/bob/history")) == (404, "not_found", "user_id")


def test_live_events(client):
    timed = {"item_id": "a", "timestamp": 5, "rating": 4, "event_id": 7}
    body = {"user_id": "安", "events": [timed, {"item_id": "甲"}]}
    answer = client.post("/v1/events", json=body).json()
    assert answer == {"user_id": "安", "accepted": 2, "duplicates": 0, "unknown_items": 1, "live_events": 2}
    again = client.post("/v1/events", json=body).json()  # what has neither a time nor a name happens a second time
    assert again == answer | {"accepted": 1, "duplicates": 1, "live_events": 3}
    newest, *_, oldest = client.get("/v1/users/安/history").json()["events"]
    assert (newest["item_id"], newest["live"], abs(newest["timestamp"] - time.time()) < 60) == ("甲", True, True)
    assert oldest == {"item_id": "a", "display": "霸王别姬", "timestamp": 5.0, "live": True}


def test_without_the_store_answers_are_degraded_and_events_refused(client, shelf):
    assert "degraded" not in client.post("/v1/recommend", json={"user_id": "ann", "k": 1}).json()
    shelf.away = True
    assert client.post("/v1/recommend", json={"user_id": "ann", "k": 1}).json()["degraded"] is True
    assert client.post("/v1/score", json={"candidates": [{"item_id": "a"}]}).json()["degraded"] is True
    assert client.get("/v1/users/ann/history").json()["degraded"] is True
    response = client.post("/v1/events", json={"user_id": "ann", "events": [{"item_id": "a"}]})
    assert error(response) == (503, "state_unavailable", None) and response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"events": [{"item_id": "a"}]}, "user_id", "'user_id' is missing"),
        ({"user_id": "u"}, "events", "'events' is missing"),
        ({"user_id": "u", "events": []}, "events", "'events': expected at least 1 entries, found 0"),
        ({"user_id": "u", "events": [{"item_id": "a"}] * 1001}, "events", "'events': expected at most 1000 entries"),
        ({"user_id": "u", "events": [{"item": "a"}]}, "events.0.item_id", "'events.0.item_id' is missing"),
        ({"user_id": "u" * 257, "events": [{"item_id": "a"}]}, "user_id", "'user_id': expected at most 256 characters"),
        ({"user_id": "u", "events": [{"item_id": "x" * 2000}]}, "events.0", "'events.0': expected an event of at most"),
        ({"user_id": "u", "events": [{"item_id": "a"}], "evens": 1}, "evens", "unknown key 'evens'; did you mean"),
    ],
)
def test_mistakes_in_live_events(client, body, field, message):
    response = client.post("/v1/events", json=body)
    assert error(response) == (422, "invalid_request", field)
    assert response.json()["error"]["message"].startswith(message)


def test_health(client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready", "model_version": "shelf-1", "items": 3}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"usr_id": "ann"}, "usr_id", "unknown key 'usr_id'; did you mean 'user_id'?"),
        ({"filter": {"alow": []}}, "filter.alow", "unknown key 'filter.alow'; did you mean 'allow'?"),
        (
            {"filter": {"categories": {"genres": {"all": []}}}},
            "filter.categories.genres.all",
            "unknown key 'filter.categories.genres.all'; valid names: any, none",
        ),
        (
            {"filter": {"ranges": {"year": {"min": "1990"}}}},
            "filter.ranges.year.min",
            "'filter.ranges.year.min': expected a number, found \"1990\"",
        ),
        (
            {"filter": {"ranges": {"year": {"min": 2, "max": 1.5}}}},
            "filter.ranges.year",
            "'filter.ranges.year': expected min at most max, found 2 and 1.5",
        ),
        ({"diversity": 1.5}, "diversity", "'diversity': expected at most 1, found 1.5"),
        ({"caps": {"genres": 0}}, "caps.genres", "'caps.genres': expected at least 1, found 0"),
        ({"k": 0}, "k", "'k': expected at least 1, found 0"),
        ({"k": "5"}, "k", "'k': expected an integer, found \"5\""),
        ({"k": True}, "k", "'k': expected an integer, found true"),
        ({"k": 4}, "k", "k is at most 3, found 4"),
        ({"exclude_seen": "no"}, "exclude_seen", "'exclude_seen': expected true or false, found \"no\""),
        ({"user_id": 1.5}, "user_id", "'user_id': expected a string or an integer, found a fraction"),
        ({"user_id": True}, "user_id", "'user_id': expected a string or an integer, found a boolean"),
        ({"user_id": "\ud800"}, "user_id", "'user_id': expected Unicode text, found half of a surrogate pair"),
        ({"events": {"item_id": "a"}}, "events", "'events': expected a list, found an object"),
        ({"events": ["a"]}, "events.0", "'events.0': expected a JSON object, found \"a\""),
        ({"events": [{"item": "a"}]}, "events.0.item_id", "'events.0.item_id' is missing"),
        ([], None, "the body: expected a JSON object, found a list"),
        (None, None, "the body: expected a JSON object, found null"),
    ],
)
def test_mistakes_in_a_body(client, body, field, message):
    response = client.post("/v1/recommend", content=json.dumps(body))
    assert error(response) == (422, "invalid_request", field)
    assert response.json()["error"]["message"] == message


@pytest.mark.parametrize("timestamp", ["yesterday", 881250949000, 1e400, True, [], "0000-01-01"])
def test_mistakes_in_a_timestamp(client, timestamp):
    response = client.post("/v1/recommend", content=json.dumps({"events": [{"item_id": "a", "timestamp": timestamp}]}))
    assert error(response) == (422, "invalid_request", "events.0.timestamp")


@pytest.mark.parametrize("candidate", [{}, {"item_id": "a", "features": {}}, {"features": 3}, {"id": "a"}])
def test_mistakes_in_a_candidate(client, candidate):
    status, code, field = error(client.post("/v1/score", json={"candidates": [candidate]}))
    assert (status, code) == (422, "invalid_request") and field.startswith("candidates.0")


@pytest.mark.parametrize(
    "body", [b'{"k":', b"{'k': 1}", b'{"user_id":"\xff"}', b"[" * 100_000, b'{"k":' + b"9" * 5000 + b"}"]
)
def test_invalid_json(client, body):
    assert error(client.post("/v1/recommend", content=body)) == (400, "invalid_json", None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(
            ("recommend", body)
            for body in (b'{"k":2}', b"", b"{", b'"\xff"', b"null", b'{"k":0}', b'{"l":1}', b'{"k":9}')
        ),
        ("recommend", b'{"user_id":"broken","k":1}'),
        ("similar", b'{"item_id":"nowhere"}'),
        ("score", b'{"candidates":[{"item_id":"a"}],"model_version":7}'),
    ],
)
def test_a_body_is_answered_as_fastapi_would(client, shelf, path, body):
    plain = create_api(shelf, max_in_flight=4, timeout_s=0.5)
    plain.user_middleware.clear()
    asked = {"url": f"/v1/{path}", "content": body, "headers": {"content-type": "application/json"}}
    ours, theirs = client.post(**asked), TestClient(plain, raise_server_exceptions=False).post(**asked)
    assert (ours.status_code, ours.content, ours.headers) == (theirs.status_code, theirs.content, theirs.headers)


def test_an_empty_body_is_a_missing_one(client):
    assert error(client.post("/v1/recommend")) == (422, "invalid_request", None)


def test_mistakes_in_an_address(client):
    assert error(client.get("/v1/nothing")) == (404, "not_found", None)
    assert error(client.get("/page/nothing.js")) == (404, "not_found", None)
    assert error(client.get("/page/../api.py")) == (404, "not_found", None)
    assert error(client.get("/v1/recommend")) == (405, "method_not_allowed", None)
    assert error(client.get("/v1/similar/a?k=0")) == (422, "invalid_request", "k")
    assert error(client.get("/v1/similar/a?k=many")) == (422, "invalid_request", "k")


def test_a_failure_inside_says_nothing_about_the_inside(client):
    assert error(client.post("/v1/recommend", json={"user_id": "broken", "k": 1})) == (500, "internal", None)


def test_openapi_describes_the_bodies(client):
    api = client.get("/openapi.json").json()
    post = api["paths"]["/v1/recommend"]["post"]
    schema = {"$ref": "#/components/schemas/RecommendBody"}
    assert post["requestBody"] == {"content": {"application/json": {"schema": schema}}, "required": True}
    assert set(post["responses"]) == {"200", "400", "404", "413", "422", "503"}
    body = api["components"]["schemas"]["RecommendBody"]
    keys = {"user_id", "events", "now", "k", "exclude_seen", "filter", "diversity", "caps", "explain", "model_version"}
    assert set(body["properties"]) == keys
    assert body["additionalProperties"] is False
    ids = {"type": "string"}, {"type": "integer"}
    assert api["components"]["schemas"]["EventBody"]["properties"]["item_id"]["anyOf"] == list(ids)


def test_pages_need_no_other_host(client):
    for path in ("/", "/docs"):
        response = client.get(path)
        assert response.headers["content-type"].startswith("text/html")
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        assert "http" not in response.text
