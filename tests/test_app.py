"""Replicas with a real model and a real store behind the routes, in one process and without Ray."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import tiny
from redis_server import RedisServer, needs_redis
from starlette.testclient import TestClient
from waiting import wait_until

from mvrec_core.config import ServeConfig
from mvrec_core.requests import Event, Request
from serve.api import create_api
from serve.app import Replica

LATER = 60.0 + max(float(row["timestamp"]) for row in tiny.event_rows() if row["user_id"] == "u003")


@pytest.fixture
def replicas(plain_checkpoint, tmp_path) -> Iterator[list[TestClient]]:
    """Two, over one file."""
    with ExitStack() as stack:
        yield [started(stack, plain_checkpoint, state_dir=str(tmp_path / "state")) for _ in range(2)]


def started(stack: ExitStack, checkpoint, **settings) -> TestClient:
    replica = Replica(str(checkpoint), ServeConfig(**settings).model_dump())
    client = stack.enter_context(TestClient(create_api(replica, 64, 10.0), raise_server_exceptions=False))
    client.replica = replica
    return client


def recommend(client: TestClient, **body) -> dict:
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 200
    return response.json()


def ids(answer: dict) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize("user", ["u003", "陌生人"])
def test_the_very_next_answer_rests_on_an_event_whoever_gives_it(replicas, plain_recommender, user):
    before = [recommend(client, user_id=user, k=40) for client in replicas]
    assert before[0] == before[1] and "i30" in ids(before[0])
    event = {"item_id": "i30", "timestamp": 2e9, "rating": 5}
    appended = replicas[0].post("/v1/events", json={"user_id": user, "events": [event]}).json()
    assert (appended["accepted"], appended["live_events"]) == (1, 1)
    expected = plain_recommender.recommend([Request(user, live=(Event("i30", 2e9, {"rating": 5}),), k=40, now=2e9)])[0]
    for client in replicas:
        after = recommend(client, user_id=user, k=40)
        assert ids(after) == [item.item_id for item in expected.items] and "i30" not in ids(after)
        assert (after["rung"], after["unknown_items"]) == ("history", 0)
        newest = client.get(f"/v1/users/{user}/history").json()["events"][0]
        assert newest == {"item_id": "i30", "display": "film number 30", "timestamp": 2e9, "live": True}


def test_an_answer_is_computed_once_until_an_event_comes(replicas):
    client, asked = replicas[0], []
    answer = client.replica._explained.answer
    client.replica._explained.answer = lambda recommend, request: asked.append(request) or answer(recommend, request)
    first = recommend(client, user_id="u003", k=3, explain=True, now=LATER)
    assert recommend(client, user_id="u003", k=3, explain=True, now=LATER) == first and len(asked) == 1
    assert recommend(client, user_id="u003", k=3, explain=True, now=LATER + 40_000) != first and len(asked) == 2
    replicas[1].post("/v1/events", json={"user_id": "u003", "events": [{"item_id": "i30"}]})
    assert recommend(client, user_id="u003", k=3, explain=True, now=LATER) != first and len(asked) == 3
    assert client.post("/v1/recommend", json={"user_id": "u003", "k": 0}).status_code == 422


def test_under_too_much_load_only_who_may_be_remembered_is_read(plain_checkpoint, tmp_path):
    with ExitStack() as stack:
        settings = {"max_batch_size": 2, "deadline_s": 0.5, "state_dir": str(tmp_path)}
        client = started(stack, plain_checkpoint, **settings)
        replica, go_on = client.replica, threading.Event()
        first = recommend(client, user_id="u003", k=3, now=LATER)
        assert replica.overload() is None and replica._cache.useful == 0
        replica._batcher._batch_s = 1.0  # as after a batch of a second
        pool = stack.enter_context(ThreadPoolExecutor(4))
        replica._thread.submit(go_on.wait)
        stack.callback(go_on.set)
        asked = [pool.submit(client.post, "/v1/recommend", json={"user_id": f"u{n}", "k": 3}) for n in range(4)]
        wait_until(lambda: len(replica._batcher._waiting) >= 2)
        unread = client.post("/v1/recommend", json={"user_id": "u003", "k": 3, "now": LATER})
        assert (unread.status_code, unread.json()["error"]["code"]) == (503, "overloaded")
        replica._cache.useful = 0.5
        assert recommend(client, user_id="u003", k=3, now=LATER) == first
        go_on.set()
        assert {one.result().status_code for one in asked} <= {200, 503}


def test_what_is_forgotten_is_in_no_answer_of_any_replica(replicas):
    one, other = replicas
    before = recommend(one, user_id="u003", k=5, now=LATER)
    events = [{"item_id": "i30", "event_id": "订单/1"}, {"item_id": "i31", "event_id": "2"}]
    one.post("/v1/events", json={"user_id": "u003", "events": events})
    both = recommend(other, user_id="u003", k=5, now=LATER)
    answer = other.delete("/v1/users/u003/events", params={"event_id": "订单/1"}).json()
    assert answer == {"user_id": "u003", "forgotten": 1, "live_events": 1}
    assert recommend(one, user_id="u003", k=5, now=LATER) not in (before, both)
    assert one.delete("/v1/users/u003/events").json() == {"user_id": "u003", "forgotten": 1, "live_events": 0}
    assert [recommend(client, user_id="u003", k=5, now=LATER) for client in replicas] == [before, before]
    assert one.delete("/v1/users/陌生人/events").json()["forgotten"] == 0


def test_an_answer_is_of_its_time_and_remembered_for_as_long_as_that_tells_nothing_new(replicas, monkeypatch):
    client, asked, clock = replicas[0], [], [LATER + 4]
    answer = client.replica._batcher.answer
    client.replica._batcher.answer = lambda recommend, request: asked.append(request.now) or answer(recommend, request)
    monkeypatch.setattr("serve.app.time.time", lambda: clock[0])
    first = recommend(client, user_id="u003", k=3)
    assert recommend(client, user_id="u003", k=3) == first and asked == [LATER + 4]
    clock[0] += 59  # 64 to 127 s after the last event is the same to the model
    assert recommend(client, user_id="u003", k=3) == first and len(asked) == 1
    clock[0] += 50_000
    later = recommend(client, user_id="u003", k=3)
    assert later == recommend(client, user_id="u003", k=3, now=clock[0]) != first
    assert recommend(client, user_id="u003", k=3, now=None) == recommend(client, user_id="u003", k=3, now=None) != first
    assert asked[2:] == [clock[0], None]


def test_what_takes_long_does_not_delay_the_others(replicas):
    client, go_on = replicas[0], threading.Event()
    blocked = client.replica._cold.submit(go_on.wait, 20)
    new = {"user_id": "u003", "candidates": [{"features": {"title": "新片"}}]}
    with ThreadPoolExecutor(2) as pool:
        scored = pool.submit(client.post, "/v1/score", json=new)
        explained = pool.submit(client.post, "/v1/recommend", json={"user_id": "u003", "k": 1, "explain": True})
        assert len(recommend(client, user_id="u003", k=3)["items"]) == 3
        assert client.post("/v1/score", json={"candidates": [{"item_id": "i30"}]}).status_code == 200
        assert not (scored.done() or explained.done())
        go_on.set()
        assert blocked.result(5) and scored.result(10).status_code == explained.result(10).status_code == 200
    refused = client.post("/v1/recommend", json={"k": 101, "explain": True})
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "k")


@pytest.mark.usefixtures("patient")
def test_an_item_that_has_gone_does_not_come_out_of_the_cache(plain_checkpoint, store):
    with ExitStack() as stack:
        one, other = (started(stack, plain_checkpoint, **store) for _ in range(2))
        body = {"user_id": "u003", "k": 3, "now": LATER}
        first = recommend(one, **body)
        gone = ids(first)[0]
        assert recommend(other, **body) == first
        assert one.delete(f"/v1/items/{gone}").status_code == 200
        for client in (one, other):
            assert gone not in ids(recommend(client, **body)) and len(recommend(client, **body)["items"]) == 3
            assert gone not in ids(client.get("/v1/similar/i30?k=38").json())
        new = {"item_id": gone, "features": {"title": "新片"}}  # a history with it is another one from now on
        assert other.put("/v1/items", json={"items": [new]}).status_code == 200
        events = [{"item_id": gone}, {"item_id": "i30"}]
        scores = [item["score"] for item in recommend(one, events=events, k=3)["items"]]
        assert scores == [item["score"] for item in recommend(other, events=events, k=3)["items"]]


@pytest.mark.usefixtures("patient")
def test_what_a_rule_withholds_does_not_come_out_of_the_cache(plain_checkpoint, store, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.live_file.LOOK_EVERY_S", 0.0)
    rules, audit = tmp_path / "rules.yaml", tmp_path / "withheld.jsonl"

    def write(text: str, second: int) -> None:
        rules.write_text(text, encoding="utf-8")
        os.utime(rules, (second, second))

    write("", 1)
    with ExitStack() as stack:
        settings = {**store, "rules": str(rules), "audit": str(audit)}
        clients = [started(stack, plain_checkpoint, **settings) for _ in range(2)]
        body = {"user_id": "u003", "k": 3, "now": LATER}
        free = recommend(clients[0], **body)
        assert recommend(clients[1], **body) == free and audit.read_text() == ""
        write(f"block: [{{why: 召回, items: [{ids(free)[0]}]}}]", 2)
        held = [recommend(client, **body) for client in clients for _ in range(2)]
        assert all(ids(answer)[:2] == ids(free)[1:] for answer in held)
        lines = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
        assert {(line["item_id"], line["why"]) for line in lines} == {(ids(free)[0], "召回")}
        assert len(lines) == (1 if "redis_url" in store else 2)  # once for each computation, not for each answer
        write("block: []", 3)
        assert [recommend(client, **body) for client in clients] == [free, free]


def test_events_are_checked_as_those_of_a_request_are(replicas):
    event = {"item_id": "i30", "rating": "十分"}
    refusals = [
        replicas[0].post("/v1/events", json={"user_id": "u003", "events": [{"item_id": "i31"}, event]}),
        replicas[0].post("/v1/recommend", json={"user_id": "u003", "events": [event]}),
    ]
    assert refusals[0].status_code == 422 and refusals[0].json() == refusals[1].json()
    assert replicas[0].get("/v1/users/u003/history").json()["events"][0]["live"] is False  # none of them was taken
    unknown = replicas[0].post("/v1/events", json={"user_id": "u003", "events": [{"item_id": "没有"}]}).json()
    assert (unknown["accepted"], unknown["unknown_items"]) == (1, 1)
    assert replicas[0].get("/v1/users/u003/history").json()["events"][0]["item_id"] == "没有"


@needs_redis
def test_without_redis_answers_are_degraded_until_it_is_back(plain_checkpoint, tmp_path):
    server = RedisServer(tmp_path)
    event = {"user_id": "陌生人", "events": [{"item_id": "i30"}]}
    try:
        with ExitStack() as stack:
            one, other = (started(stack, plain_checkpoint, redis_url=server.url) for _ in range(2))
            assert one.post("/v1/events", json=event).json()["accepted"] == 1
            assert recommend(other, user_id="陌生人")["rung"] == "history"
            server.kill()
            for _ in range(5):
                answer = recommend(other, user_id="陌生人", k=3)
                assert (answer["degraded"], answer["rung"], len(answer["items"])) == (True, "popularity", 3)
            assert "degraded" not in recommend(other, events=[{"item_id": "i30"}])  # it needs no store
            assert other.get("/v1/users/陌生人/history").json() == {"user_id": "陌生人", "events": [], "degraded": True}
            refused = other.post("/v1/events", json=event)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "state_unavailable"
            server.start()
            deadline = time.monotonic() + 10
            while other.post("/v1/events", json=event).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            answer = recommend(other, user_id="陌生人", k=3)
            assert answer["rung"] == "history" and "degraded" not in answer
    finally:
        server.kill()
