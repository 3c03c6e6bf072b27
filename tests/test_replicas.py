"""Several replicas under real Ray Serve: they come and go, one stands still, their Redis goes away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest
from redis_server import RedisServer, needs_redis
from service import (
    GONE,
    Service,
    running,
    wait_until,
)

from serve.watch import KEEP_EVERY_S


@pytest.mark.ray
@needs_redis
def test_redis_goes_and_comes_back_under_two_replicas(checkpoint, tmp_path):
    redis = RedisServer(tmp_path)
    options = ("--min-replicas", "2", "--max-replicas", "2", "--redis-url", redis.url)
    stop, answers, refusals = threading.Event(), [], []

    def ask(service: Service) -> None:
        with httpx.Client(base_url=service.url, timeout=30) as asking:
            while not stop.is_set():
                answers.append(asking.post("/v1/recommend", json={"user_id": "u003", "k": 3}))

    def append(service: Service, user: str) -> httpx.Response:
        events = [{"item_id": f"i{n:02d}"} for n in range(10)]
        response = httpx.post(f"{service.url}/v1/events", json={"user_id": user, "events": events}, timeout=30)
        if response.status_code != 200:
            refusals.append(response)
        return response

    def rungs(service: Service, user: str) -> set[str]:
        """Of requests at the same time, so that both replicas have some; each differs, so that no cache answers."""

        def one(k: int) -> str:
            body = {"user_id": user, "k": k}
            return httpx.post(f"{service.url}/v1/recommend", json=body, timeout=30).json()["rung"]

        with ThreadPoolExecutor(8) as pool:
            return set(pool.map(one, range(1, 25)))

    try:
        with running(checkpoint, *options) as service, ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask, service) for _ in range(2)]
            try:
                assert rungs(service, "甲") == {"popularity"}
                assert append(service, "甲").status_code == 200
                assert rungs(service, "甲") == {"history"}
                redis.kill()
                wait_until(lambda: answers[-1].json().get("degraded"))
                assert append(service, "乙").json()["error"]["code"] == "state_unavailable"
                redis.start()
                wait_until(lambda: append(service, "乙").status_code == 200)
                wait_until(lambda: rungs(service, "乙") == {"history"})
            finally:
                stop.set()
            for one in asking:
                one.result(30)
    finally:
        redis.kill()
    assert len(answers) > 50 and {response.status_code for response in answers} == {200}
    assert "degraded" not in answers[0].json() and "degraded" not in answers[-1].json()
    assert {response.status_code for response in refusals} == {503}


@pytest.mark.ray
def test_replicas_come_with_the_load_and_go_with_it(checkpoint, tmp_path):
    options = ("--min-replicas", "1", "--max-replicas", "2", "--max-batch-size", "2", "--state-dir", str(tmp_path))
    stop, failures = threading.Event(), []

    def ask(service: Service) -> None:
        with httpx.Client(base_url=service.url, timeout=30) as asking:
            n = 0
            while not stop.is_set():
                n += 1
                response = asking.post("/v1/recommend", json={"user_id": "u003", "k": 3, "filter": {"deny": [str(n)]}})
                if response.status_code != 200:
                    failures.append(response.text)

    def replicas() -> int:
        """Those that have told their metrics of late."""
        told = [path.stat().st_mtime for path in (tmp_path / "metrics").glob("*.json")]
        return sum(time.time() - one < 2.5 * KEEP_EVERY_S for one in told)

    with (
        running(checkpoint, *options, "--upscale-s", "1", "--downscale-s", "2") as service,
        ThreadPoolExecutor(12) as pool,
    ):
        assert replicas() == 1
        asking = [pool.submit(ask, service) for _ in range(12)]
        try:
            wait_until(lambda: replicas() == 2, 90)
        finally:
            stop.set()
        for one in asking:
            one.result(30)
        wait_until(lambda: replicas() == 1, 90)
    assert failures == []


@pytest.mark.ray
def test_a_replica_that_stands_still_is_replaced_and_the_service_goes_on(checkpoint, tmp_path):
    options = ("--min-replicas", "2", "--max-replicas", "2", "--deadline-s", "2", "--state-dir", str(tmp_path))
    stop, answers = threading.Event(), []

    def ask(service: Service) -> None:
        while not stop.is_set():
            try:
                body = {"user_id": "u003", "k": 3}
                answers.append(httpx.post(f"{service.url}/v1/recommend", json=body, timeout=30).status_code)
            except httpx.RemoteProtocolError:  # the replica that had it was ended
                answers.append(GONE)

    def replicas(service: Service) -> dict[int, psutil.Process]:
        found = {}
        for child in psutil.Process(service.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ServeReplica"):
                    found[child.pid] = child
        return found

    with running(checkpoint, *options) as service, ThreadPoolExecutor(4) as pool:
        wait_until(lambda: len(replicas(service)) == 2)
        asking = [pool.submit(ask, service) for _ in range(4)]
        try:
            still = next(iter(replicas(service).values()))
            still.suspend()  # as one does that swaps, or waits for a disk that has gone
            wait_until(lambda: still.pid not in replicas(service) and len(replicas(service)) == 2, 150)
            wait_until(lambda: answers[-40:] == 40 * [200], 90)
        finally:
            stop.set()
        for one in asking:
            one.result(60)
    failed = [status for status in answers if status != 200]
    assert len(failed) <= 8 and all(status in (GONE, 500, 502, 503, 504) for status in failed)
