"""Metrics, the log of requests and the health of replicas, with a real model and real stores, without Ray."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer, needs_redis
from shelf import Shelf
from starlette.testclient import TestClient

from mvrec_core import checkpoint as checkpoints
from mvrec_core.config import ServeConfig
from mvrec_core.drift import LEAST_RECENT, Bins, Reference
from mvrec_core.errors import ResourceError
from mvrec_core.explanations import ViewUse
from mvrec_core.reference import reference
from serve.api import create_api
from serve.app import Replica
from serve.metrics import Metrics, page
from serve.watch import RequestLog, Watch

ROOT = Path(__file__).parents[1]
BOARD = ROOT / "docs" / "deploy" / "grafana.json"


@pytest.fixture(scope="module")
def with_reference(plain_checkpoint, plain_data, plain_config, tmp_path_factory) -> Path:
    loaded = checkpoints.load(plain_checkpoint)
    seen = reference(loaded.model, plain_data.shards(plain_config), plain_config)
    directory = tmp_path_factory.mktemp("reference") / "checkpoint"
    checkpoints.save(directory, loaded.model, plain_data, loaded.item_vectors, {}, reference=seen)
    return directory


def started(stack: ExitStack, checkpoint, **settings) -> TestClient:
    replica = Replica(str(checkpoint), ServeConfig(**settings).model_dump())
    client = stack.enter_context(TestClient(replica.__serve_build_asgi_app__(), raise_server_exceptions=False))
    client.replica = replica
    return client


def samples(client: TestClient) -> dict[str, list]:
    """{sample name: samples}"""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def total(found: dict[str, list], name: str, **labels) -> float:
    return sum(one.value for one in found.get(name, []) if labels.items() <= one.labels.items())


def test_whichever_replica_is_asked_tells_of_all(with_reference, store, monkeypatch):
    monkeypatch.setattr("serve.watch.KEEP_EVERY_S", 0.05)
    with ExitStack() as stack:
        one, other = (started(stack, with_reference, **store) for _ in range(2))
        for k in (3, 3, 4):
            assert one.post("/v1/recommend", json={"user_id": "u003", "k": k}).status_code == 200
        events = [{"item_id": "没有"}, {"item_id": "i30"}]
        assert other.post("/v1/recommend", json={"events": events, "k": 2}).status_code == 200
        assert other.post("/v1/recommend", json={"k": 0}).status_code == 422
        assert other.get("/v1/similar/无").status_code == 404
        deadline, last = time.monotonic() + 10, {"mvrec_items": 80, "mvrec_requests_total": 6}
        while any(total(samples(client), name) < all_of for client in (one, other) for name, all_of in last.items()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pages = [samples(client) for client in (one, other)]
        route, version = "/v1/recommend", one.replica.model_version
        for found in pages:
            assert total(found, "mvrec_requests_total", route=route, status="200", code="ok") == 4
            assert total(found, "mvrec_requests_total", status="422", code="invalid_request") == 1
            assert total(found, "mvrec_requests_total", route="/v1/similar/{item_id}", code="not_found") == 1
            assert total(found, "mvrec_answers_total", rung="history", model_version=version) == 4
            assert total(found, "mvrec_unknown_items_total") == 1
            assert total(found, "mvrec_cache_lookups_total", result="near") == 1
            assert total(found, "mvrec_cache_lookups_total", result="miss") == 3
            assert total(found, "mvrec_batch_requests_count") == 3
            assert total(found, "mvrec_stage_seconds_count", stage="model") == 3
            assert total(found, "mvrec_stage_seconds_count", stage="state") == 4
            assert total(found, "mvrec_request_seconds_count", route=route, model_version=version) == 4
            assert total(found, "mvrec_items", model_version=version) == 2 * 40
            assert total(found, "mvrec_view_steps_total", view="text") >= 2
            assert {sample.labels["replica"] for sample in found["mvrec_requests_in_flight"]} == {
                client.replica.watch.metrics.replica for client in (one, other)
            }
        assert "mvrec_drift_psi" not in pages[0]  # too few for now
        told = json.dumps([[sample.labels for sample in every] for every in pages[0].values()])
        assert "u003" not in told and "没有" not in told


@needs_redis
def test_without_redis_a_replica_tells_of_itself(plain_checkpoint, tmp_path):
    server = RedisServer(tmp_path)
    with ExitStack() as stack:
        client = started(stack, plain_checkpoint, redis_url=server.url)
        server.kill()
        assert client.post("/v1/recommend", json={"user_id": "u003", "k": 3}).json()["degraded"] is True
        found = samples(client)
        assert total(found, "mvrec_degraded_answers_total") == 1
        assert total(found, "mvrec_answers_total", route="/v1/recommend") == 1


def test_drift_is_told_when_there_is_enough_to_tell():
    metrics, bins = Metrics("r"), Bins.of(range(100))
    seen = Reference(100, {"score": bins}, {"text": bins})
    for number in range(LEAST_RECENT):
        metrics.scored("v1", seen, number % 100, at_now=False)
        metrics.scored("v2", seen, 200.0, at_now=False)
        metrics.used("v1", seen, ViewUse({"text": 0.0, "other": 1.0}, {"text": 0.5, "gender": 1.0}))
    (drift,) = [one for one in text_string_to_metric_families(page([metrics.values()]).decode()) if "psi" in one.name]
    values = {(one.labels["what"], one.labels["model_version"]): one.value for one in drift.samples}
    assert values[("score", "v1")] < 0.01 and values[("score", "v2")] > 1 and values[("weight", "v1")] > 1
    assert len(values) == 3
    text = page([metrics.values()]).decode()
    assert 'mvrec_view_missing_total{model_version="v1",replica="r",view="text"} 250.0' in text


@pytest.fixture
def logged(tmp_path):
    shelf = Shelf()
    shelf.watch = Watch(Metrics("r"), None, RequestLog(tmp_path / "log" / "requests.jsonl"))
    client = TestClient(create_api(shelf, 2, 0.5), raise_server_exceptions=False)
    return client, shelf, lambda: [json.loads(line) for line in (tmp_path / "log" / "requests.jsonl").open()]


def test_a_line_for_each_request_without_ids_and_text(logged):
    client, shelf, lines = logged
    body = {"user_id": "ann", "events": [{"item_id": "秘密"}], "k": 2}
    client.post("/v1/recommend", json=body, headers={"X-Request-ID": "order-17"})
    client.get("/v1/users/ann/history", headers={"X-Request-ID": "a b\x7f" + "x" * 100})
    client.post("/v1/recommend", json={"k": "many"})
    client.post("/v1/recommend", json={"user_id": "broken", "k": 1})
    client.get("/v1/nowhere/秘密")
    client.get("/health/live")  # is not told
    first, second, third, fourth, fifth = lines()
    told = {name: first[name] for name in ("request_id", "method", "route", "status", "code", "k", "unknown_items")}
    assert told == {
        "request_id": "order-17",
        "method": "POST",
        "route": "/v1/recommend",
        "status": 200,
        "code": "ok",
        "k": 2,
        "unknown_items": 1,
    }
    assert (first["model_version"], first["rung"], first["degraded"]) == ("shelf-1", "history", False)
    assert 0 < first["ms"] < 500
    assert second["route"] == "/v1/users/{user_id}/history" and second["request_id"] == "a_b_" + "x" * 60
    assert (third["status"], third["code"]) == (422, "invalid_request") and len(third["request_id"]) == 36
    assert (fourth["status"], fourth["code"]) == (500, "internal")
    assert (fifth["status"], fifth["route"]) == (404, "none")
    assert not re.search("ann|秘密|many", json.dumps(lines(), ensure_ascii=False))


def test_late_and_refused_requests_are_told_and_say_when_to_come_back(logged):
    client, shelf, lines = logged
    shelf.delay_s = 5.0
    late = client.post("/v1/recommend", json={"k": 1})
    assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (503, "timeout", "1")
    assert [(line["status"], line["code"]) for line in lines()] == [(503, "timeout")]
    assert shelf.watch.metrics.in_flight._value.get() == 0


def test_health_notices_a_model_that_stands_still(plain_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.app.STALLED_S", 0.1)
    replica = Replica(str(plain_checkpoint), ServeConfig(state_dir=str(tmp_path)).model_dump())
    asyncio.run(replica.check_health())
    go_on = threading.Event()
    blocked = replica._thread.submit(go_on.wait, 10)
    time.sleep(0.2)
    with pytest.raises(ResourceError, match="at one batch for"):
        asyncio.run(replica.check_health())
    go_on.set()
    blocked.result(5)
    asyncio.run(replica.check_health())


def test_the_board_asks_for_metrics_that_exist():
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    metrics = Metrics("r")
    exist = set()
    for metric in metrics.registry.collect():
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[metric.type]
        exist |= {metric.name + suffix for suffix in suffixes}
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    used = {name for expr in asked for name in re.findall(r"\bmvrec_\w+", expr)}
    assert used and used <= exist
    left = {name for name in exist - used if not name.endswith(("_sum", "_count"))}
    assert not left, "the board leaves out"
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Load", "Latency", "Cache", "Rungs", "Drift"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
