"""What the service refuses before it looks."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from shelf import error

from mvrec_core.errors import Overloaded
from serve.api import create_api
from serve.limits import MAX_BODY


def test_a_long_body_is_refused(client, shelf):
    assert error(client.post("/v1/recommend", content=b" " * 10_000_000)) == (413, "body_too_long", None)
    assert shelf.request is None
    longest = b'{"k":1}'.ljust(MAX_BODY)
    assert client.post("/v1/recommend", content=longest).status_code == 200
    assert client.post("/v1/recommend", content=longest + b" ").status_code == 413


@pytest.mark.parametrize(("headers", "pieces"), [([(b"content-length", b"10000000")], 0), ([], 11)])
def test_no_more_of_a_long_body_is_read_than_the_limit(shelf, headers, pieces):
    read, sent = [], []

    async def receive():
        read.append(100_000)
        return {"type": "http.request", "body": b" " * 100_000, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "headers": headers, "query_string": b""}
    asyncio.run(create_api(shelf, 4, 5.0)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert len(read) == pieces


def test_too_late_is_503(client, shelf):
    shelf.delay_s = 5.0
    assert error(client.post("/v1/recommend", json={"k": 1})) == (503, "timeout", None)


def test_too_many_at_a_time_are_503_at_once(client, shelf):
    shelf.delay_s = 0.3
    with client, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: client.post("/v1/recommend", json={"k": 1}), range(8)))
        assert client.get("/health/live").status_code == 200
    codes = sorted(response.status_code for response in responses)
    assert codes == [200] * 4 + [503] * 4
    refused = next(response for response in responses if response.status_code == 503)
    assert error(refused)[1] == "overloaded" and refused.headers["retry-after"] == "1"


def test_who_would_wait_too_long_is_refused_unread(client, shelf):
    shelf.full = Overloaded("41 requests wait, and an answer takes 2.3 s; try again", 2.3)
    for body in (b'{"k":1}', b"not even JSON"):
        refused = client.post("/v1/recommend", content=body)
        assert error(refused) == (503, "overloaded", None) and refused.headers["retry-after"] == "3"
    assert shelf.request is None
    assert client.post("/v1/score", json={"candidates": [{"item_id": "a"}]}).status_code == 200
    shelf.full = None
    assert client.post("/v1/recommend", json={"k": 1}).status_code == 200
