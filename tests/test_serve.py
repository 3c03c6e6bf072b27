"""The service as a user starts it: a process of its own, Ray and HAProxy included."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import httpx
import psutil
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from redis_server import RedisServer, needs_redis
from waiting import wait_until

from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request
from serve.app import build
from serve.watch import KEEP_EVERY_S

ROOT = Path(__file__).parents[1]
START_WITHIN_S = 90
STOP_WITHIN_S = 30
GONE = 0  # instead of a status


def environment() -> dict[str, str]:
    """Without what would join the session's Ray, and in the poorest locale."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONIOENCODING"))}
    return {**outer, "LC_ALL": "C", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(checkpoint: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), *more]


def refused(checkpoint: Path, *more: str) -> str:
    """The one line on stderr of a start that must fail."""
    run = subprocess.run(
        command(checkpoint, *more), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=START_WITHIN_S
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    lines: Queue[str]

    def wait_for(self, words: str, timeout_s: float) -> str:
        while True:
            line = self.lines.get(timeout=timeout_s)
            if words in line:
                return line


def start(checkpoint: Path, *more: str) -> Service:
    port = free_port()
    process = subprocess.Popen(
        command(checkpoint, "--port", str(port), "--threads", "1", *(more or ("--max-replicas", "1"))),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: Queue[str] = Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    return Service(process, f"http://127.0.0.1:{port}", lines)


@contextmanager
def running(checkpoint: Path, *more: str) -> Iterator[Service]:
    started = start(checkpoint, *more)
    try:
        started.wait_for("Ready: ", START_WITHIN_S)
        yield started
    except Empty:
        pytest.fail(f"the service was not ready within {START_WITHIN_S} s")
    finally:
        if started.process.poll() is None:
            started.process.send_signal(signal.SIGTERM)
            started.process.wait(STOP_WITHIN_S)


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with running(checkpoint) as started:
        yield started


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    once = httpx.Limits(max_keepalive_connections=0)  # HAProxy closes an idle connection when it is set up anew
    with httpx.Client(base_url=service.url, timeout=30, limits=once) as opened:
        yield opened


@pytest.fixture(scope="module")
def user(client: httpx.Client) -> str:
    return client.get("/v1/users?limit=1").json()["users"][0]


@pytest.mark.ray
def test_answers_are_those_of_the_recommender(client, checkpoint, user):
    recommender = Recommender.load(checkpoint)
    expected = recommender.recommend([Request(user_id=user, k=5, explain=True, now="clock")])[0]
    answer = client.post("/v1/recommend", json={"user_id": user, "k": 5, "explain": True}).json()
    assert answer["model_version"] == recommender.model_version
    assert answer["rung"] == expected.rung == "history"
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx([one.score for one in expected.items], abs=1e-4)
    assert answer["items"][0]["views"] == pytest.approx(expected.items[0].explanation.views, abs=1e-4)
    assert client.get("/health/ready").json()["items"] == recommender.n_items


@pytest.mark.ray
def test_curl_without_a_content_type(service, user):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = f'{{"user_id":"{user}","k":2}}'
    run = subprocess.run(["curl", "-s", "-X", "POST", f"{service.url}/v1/recommend", "-d", body], capture_output=True)
    assert run.stdout.startswith(b'{"model_version":')


@pytest.mark.ray
def test_one_malformed_request_among_eight(client, user):
    bodies = [{"user_id": user, "k": 3}] * 3 + [{"user_id": user, "k": 10_000_000}] + [{"user_id": user, "k": 3}] * 4
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda body: client.post("/v1/recommend", json=body), bodies))
    assert [response.status_code for response in responses] == [200, 200, 200, 422, 200, 200, 200, 200]
    assert responses[3].json()["error"]["field"] == "k"
    lists = [response.json()["items"] for response in responses if response.status_code == 200]
    assert len({tuple(item["item_id"] for item in items) for items in lists}) == 1
    for items in lists:  # sums are rounded by the size of the batch
        assert [item["score"] for item in items] == pytest.approx([item["score"] for item in lists[0]], abs=1e-5)


@pytest.mark.ray
def test_an_unknown_user_and_unknown_items_are_answered(client):
    answer = client.post("/v1/recommend", json={"user_id": "nobody at all", "k": 2}).json()
    assert (answer["rung"], len(answer["items"])) == ("popularity", 2)
    events = [{"item_id": "no such item"}, {"item_id": "没有"}]
    assert client.post("/v1/recommend", json={"events": events, "k": 2}).json()["unknown_items"] == 2


@pytest.mark.ray
def test_score_and_similar(client, user):
    item = client.post("/v1/recommend", json={"user_id": user, "k": 1}).json()["items"][0]
    body = {"user_id": user, "candidates": [{"item_id": item["item_id"]}, {"item_id": "no such item"}]}
    answer = client.post("/v1/score", json=body).json()
    assert answer["candidates"][0]["score"] == pytest.approx(item["score"], abs=1e-4)
    assert answer["candidates"][1] == {"item_id": "no such item", "score": None, "probability": None}
    assert answer["unknown_items"] == 1
    similar = client.get(f"/v1/similar/{item['item_id']}?k=2").json()["items"]
    assert len(similar) == 2 and item["item_id"] not in [one["item_id"] for one in similar]
    assert client.get("/v1/similar/no such item").status_code == 404


@pytest.mark.ray
def test_items_come_and_go_at_once(client, user):
    new = {"item_id": "新片", "features": {"title": "流浪地球 3", "genres": "科幻", "year": 2030}}
    body = {"user_id": user, "filter": {"ranges": {"year": {"min": 2025}}}}
    before = client.get("/health/ready").json()["items"]
    assert client.post("/v1/recommend", json=body).json()["items"] == []
    assert client.put("/v1/items", json={"items": [new]}).json()["items"] == before + 1
    (item,) = client.post("/v1/recommend", json=body).json()["items"]
    assert (item["item_id"], item["display"], item["rank"]) == ("新片", "流浪地球 3", 1)
    assert client.delete("/v1/items/新片").json()["items"] == before
    assert client.post("/v1/recommend", json=body).json()["items"] == []
    assert client.delete("/v1/items/新片").status_code == 404


@pytest.mark.ray
def test_history_is_newest_first(client, user):
    times = [event["timestamp"] for event in client.get(f"/v1/users/{user}/history").json()["events"]]
    assert times and times == sorted(times, reverse=True)


@pytest.mark.ray
def test_an_event_changes_the_next_answer_and_is_kept_beside_the_checkpoint(client, checkpoint):
    event = {"item_id": "i03", "timestamp": "2026-01-01", "event_id": 1}
    assert client.post("/v1/events", json={"user_id": "新用户", "events": [event]}).json()["live_events"] == 1
    answer = client.post("/v1/recommend", json={"user_id": "新用户", "k": 39}).json()
    assert answer["rung"] == "history" and "i03" not in [item["item_id"] for item in answer["items"]]
    assert (checkpoint.parent / "state" / "live.sqlite3").is_file()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"k": 0}', 422, "invalid_request"),
        (b'{"k": 100000000}', 422, "invalid_request"),
        (b'{"k": 1', 400, "invalid_json"),
        (b" " * 10_000_000, 413, "body_too_long"),
    ],
)
def test_bad_requests(client, body, status, code):
    response = client.post("/v1/recommend", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.ray
def test_health_pages_and_interface(client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/docs").status_code == 200
    assert "MVRec" in client.get("/").text
    assert client.get("/page/app.js").status_code == 200
    assert "/v1/recommend" in client.get("/openapi.json").json()["paths"]
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"


@pytest.mark.ray
def test_a_request_has_its_id_and_is_counted(client):
    body = {"user_id": "u003", "k": 1}
    given = client.post("/v1/recommend", json=body, headers={"X-Request-ID": "order-17"})
    assert given.headers.get_list("x-request-id") == ["order-17"]
    assert len(client.post("/v1/recommend", json=body).headers["x-request-id"]) >= 16
    metrics = client.get("/metrics").text
    assert re.search(r'mvrec_answers_total{[^}]*route="/v1/recommend",rung="history"} [1-9]', metrics)


@pytest.mark.ray
def test_the_port_in_use_is_one_sentence(service, checkpoint):
    port = service.url.rpartition(":")[2]
    assert f"cannot listen on 127.0.0.1:{port}" in refused(checkpoint, "--port", port)


def test_what_is_not_a_checkpoint_is_one_sentence(tmp_path):
    assert "no such checkpoint directory" in refused(tmp_path / "none")
    assert "it has no manifest.json" in refused(tmp_path)


@pytest.mark.ray
def test_keys_that_cannot_be_read_are_one_sentence_without_them(checkpoint):
    error = refused(checkpoint, "--port", str(free_port()), "--api-keys", "a-key-in-place-of-a-file")
    assert "serve.api_keys cannot be read: FileNotFoundError" in error and "a-key" not in error


@pytest.mark.ray
def test_the_deploy_file_builds_the_application(checkpoint):
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.app:build"
    assert build({**application.args, "checkpoint": str(checkpoint), "max_batch_size": 4})
    with pytest.raises(ValidationError, match="max_replica"):
        build({"checkpoint": str(checkpoint), "max_replica": 4})


@pytest.mark.ray
def test_a_damaged_checkpoint_is_one_sentence(checkpoint, tmp_path):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in refused(damaged, "--port", str(free_port()))


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


@pytest.mark.ray
def test_sigterm_stops_it_cleanly(service):  # the last one: it ends the service
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(STOP_WITHIN_S) == 0
    assert service.wait_for("Stopped.", 5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/health/live")
