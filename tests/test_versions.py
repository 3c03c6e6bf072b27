"""Versions come and go while requests are answered: a replica in this process, and Ray Serve under load."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from waiting import wait_until

from mvrec_core.config import ServeConfig
from mvrec_core.errors import CheckpointError, ConfigError
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Event, Request
from mvrec_core.sealed import verify
from serve.alias import publish, roll_back
from serve.app import Replica, application, build
from serve.versions import chosen

SWAPS = 20
PEOPLE = [f"客户{n}" for n in range(1000)]


@pytest.fixture
def file(plain_checkpoint, tmp_path) -> Path:
    publish(plain_checkpoint, tmp_path / "shop.json")
    return tmp_path / "shop.json"


@pytest.fixture
def names(plain_checkpoint, other_checkpoint) -> tuple[str, str]:
    return name(plain_checkpoint), name(other_checkpoint)


def name(checkpoint: Path) -> str:
    return verify(checkpoint)["model_version"]


@contextmanager
def replica(served: Path, **settings: Any) -> Iterator[TestClient]:
    """It looks at the file all the time."""
    settings = {"state_dir": str(served.parent / "state"), **settings}
    started = Replica(str(served), ServeConfig(**settings).model_dump())
    with TestClient(started.__serve_build_asgi_app__()) as client:
        yield client


@pytest.fixture
def client(file, monkeypatch) -> Iterator[TestClient]:
    monkeypatch.setattr("serve.live_file.LOOK_EVERY_S", 0.01)
    with replica(file) as started:
        yield started


def live(client: Any) -> dict[str, float]:
    versions = client.get("/v1/versions").json()["versions"]
    return {one["model_version"]: round(one["share"], 6) for one in versions if one["state"] == "live"}


def states(client: Any) -> list[tuple[str, str]]:
    return [(one["model_version"], one["state"]) for one in client.get("/v1/versions").json()["versions"]]


def recommend(client: Any, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def expected(recommender: Recommender, *requests: Request) -> list[list[str]]:
    asked = [dataclasses.replace(request, now="clock") for request in requests]
    return [[item.item_id for item in answer.items] for answer in recommender.recommend(asked)]


def test_what_is_published_is_taken_and_a_rollback_too(client, file, names, plain_checkpoint, other_checkpoint):
    old, new = names
    lists = {
        name(one): expected(Recommender.load(one), Request("u003"))[0] for one in (plain_checkpoint, other_checkpoint)
    }
    assert lists[old] != lists[new]
    for change, wanted in (
        (lambda: publish(other_checkpoint, file), new),
        (lambda: publish(plain_checkpoint, file), old),
        (lambda: roll_back(file), new),
        (lambda: roll_back(file), old),
    ):
        change()
        wait_until(lambda wanted=wanted: live(client) == {wanted: 1})
        answer = recommend(client, user_id="u003")
        assert (answer["model_version"], ids(answer)) == (wanted, lists[wanted])
        assert client.get("/health/ready").json()["model_version"] == wanted
    assert states(client) == [(old, "live")]


@pytest.mark.parametrize("how", ["no numbers", "changed since"])
def test_a_version_that_does_not_pass_is_refused_and_the_old_one_goes_on(
    client, file, names, how, plain_checkpoint, other_checkpoint, broken_checkpoint
):
    recommend(client, user_id="u003")
    checkpoint = broken_checkpoint if how == "no numbers" else plain_checkpoint
    bad = name(checkpoint) if how == "no numbers" else "0123456789ab"
    told = json.loads(file.read_text())
    release = {"checkpoint": str(checkpoint), "model_version": bad, "share": 0.5, "since": 1.8e9}
    told["live"] = [told["live"][0] | {"share": 0.5}, release]
    file.write_text(json.dumps(told))
    wait_until(lambda: (bad, "refused") in states(client))
    assert live(client) == {names[0]: 1}
    reason = client.get("/v1/versions").json()["versions"][1]["reason"]
    assert ("version" in reason and bad in reason) if how == "no numbers" else f"expected version {bad}" in reason
    assert {recommend(client, user_id=user)["model_version"] for user in PEOPLE[:20]} == {names[0]}
    file.write_text("{")
    time.sleep(0.1)
    assert live(client) == {names[0]: 1}
    file.write_text(json.dumps(told))
    roll = told | {"live": [told["live"][0] | {"share": 1}]}
    file.write_text(json.dumps(roll))
    publish(other_checkpoint, file)
    wait_until(lambda: states(client) == [(names[1], "live")])


def test_users_are_split_by_a_stable_hash(client, file, names, other_checkpoint):
    def of_the_new(people: list[str]) -> set[str]:
        return {user for user in people if recommend(client, user_id=user, k=1)["model_version"] == names[1]}

    publish(other_checkpoint, file, 0.2)
    wait_until(lambda: live(client) == {names[0]: 0.8, names[1]: 0.2})
    fifth = of_the_new(PEOPLE[:150])
    assert 15 <= len(fifth) <= 45 and of_the_new(PEOPLE[:30]) == fifth & set(PEOPLE[:30])
    publish(other_checkpoint, file, 0.4)
    wait_until(lambda: live(client) == {names[0]: 0.6, names[1]: 0.4})
    more = of_the_new(PEOPLE[:150])
    assert 40 <= len(more) <= 80 and fifth < more  # nobody goes back
    guests = [
        [recommend(client, events=[{"item_id": f"i{n:02d}"}], k=1)["model_version"] for n in range(20)]
        for _ in range(2)
    ]
    assert guests[0] == guests[1] and set(guests[0]) == set(names)
    assert recommend(client, k=1)["model_version"] == names[0]  # about nobody: the version of the most users


def test_the_share_of_a_hash():
    for asked in ([Request(user) for user in PEOPLE], [Request(None, (Event(user),)) for user in PEOPLE]):
        places = [chosen([0.2, 0.5, 0.3], request) for request in asked]
        assert [places.count(place) for place in range(3)] == pytest.approx([200, 500, 300], abs=50)


def test_a_request_names_the_version_that_it_wants(client, file, names, plain_checkpoint, other_checkpoint):
    publish(other_checkpoint, file, 0.5)
    wait_until(lambda: set(live(client)) == set(names))
    candidates = [{"item_id": "i30"}]
    scores = set()
    for checkpoint in (plain_checkpoint, other_checkpoint):
        recommender = Recommender.load(checkpoint)
        version = {"model_version": recommender.model_version}
        for user in ("u003", "u004", "u005"):
            answer = recommend(client, user_id=user, **version)
            assert answer["model_version"] == recommender.model_version
            assert ids(answer) == expected(recommender, Request(user))[0]
        similar = [item.item_id for item in recommender.similar("i03", Request(k=5))]
        for answer in (
            client.get("/v1/similar/i03", params={"k": 5, **version}).json(),
            client.post("/v1/similar", json={"item_id": "i03", "k": 5, **version}).json(),
        ):
            assert (answer["model_version"], ids(answer)) == (recommender.model_version, similar)
        score = client.post("/v1/score", json={"user_id": "u003", "candidates": candidates, **version}).json()
        assert score["model_version"] == recommender.model_version
        scores.add(score["candidates"][0]["score"])
    assert len(scores) == 2
    for refused in (
        client.post("/v1/recommend", json={"user_id": "u003", "model_version": "没有"}),
        client.post("/v1/score", json={"candidates": candidates, "model_version": "没有"}),
        client.get("/v1/similar/i03", params={"model_version": "没有"}),
    ):
        message = f"model_version: expected one of {names[0]}, {names[1]}, found '没有'"
        assert refused.status_code == 404
        assert refused.json() == {"error": {"code": "not_found", "message": message, "field": "model_version"}}


def test_live_items_and_rules_are_those_of_every_version(file, names, other_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.live_file.LOOK_EVERY_S", 0.01)
    rules = tmp_path / "rules.yaml"
    rules.write_text("block: [{why: 召回, items: [i03]}]", encoding="utf-8")
    new = {"item_id": "新片", "features": {"title": "流浪地球 3", "year": 2030}}
    with replica(file, rules=str(rules)) as client:
        assert client.put("/v1/items", json={"items": [new]}).json()["model_version"] == names[0]
        publish(other_checkpoint, file, 0.5)
        wait_until(lambda: set(live(client)) == set(names))

        def both(*allowed: str) -> list[list[str]]:
            wanted = {"user_id": "陌生人", "filter": {"allow": allowed}}
            return [ids(recommend(client, model_version=one, **wanted)) for one in names]

        assert both("i03", "新片") == [["新片"]] * 2
        client.put("/v1/items", json={"items": [new | {"item_id": "又一部"}]})
        client.delete("/v1/items/新片")
        assert both("i03", "新片", "又一部") == [["又一部"]] * 2
        rules.write_text("", encoding="utf-8")
        wait_until(lambda: both("i03") == [["i03"]] * 2)


def test_a_new_replica_takes_what_was_before_where_what_is_live_is_damaged(file, plain_checkpoint, other_checkpoint):
    damaged = shutil.copytree(other_checkpoint, file.parent / "damaged")
    publish(damaged, file)
    (damaged / "model.safetensors").write_bytes(b"x")
    with replica(file) as client:
        assert states(client) == [(name(plain_checkpoint), "live"), (name(other_checkpoint), "refused")]
        assert recommend(client, user_id="u003")["model_version"] == name(plain_checkpoint)
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        Replica(str(damaged), {"state_dir": str(file.parent)})


def test_a_deploy_file_names_a_checkpoint_or_an_alias(file, plain_checkpoint, tmp_path):
    assert build({"alias": str(file), "max_batch_size": 4}) and build({"checkpoint": str(plain_checkpoint)})
    for both in ({}, {"alias": str(file), "checkpoint": str(plain_checkpoint)}):
        with pytest.raises(ConfigError, match="expected either 'checkpoint' or 'alias'"):
            build(both)
    with pytest.raises(ConfigError, match="no.json: no such alias file; 'mvrec publish' writes one"):
        build({"alias": str(tmp_path / "no.json")})


# Ray Serve


@pytest.fixture(scope="module")
def served(plain_checkpoint, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("served") / "shop.json"
    publish(plain_checkpoint, file)
    return file


@pytest.fixture(scope="module")
def address(served, ray_local) -> Iterator[str]:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(str(served), ServeConfig(max_replicas=1)), name="versions", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.ray
def test_twenty_swaps_under_load(address, served, plain_checkpoint, other_checkpoint):
    """No answer but 200, each wholly of the version that it names, and after a swap none of the one before."""
    both = [Recommender.load(checkpoint) for checkpoint in (plain_checkpoint, other_checkpoint)]
    old, new = (recommender.model_version for recommender in both)
    users = [f"u{n:03d}" for n in range(0, 100, 5)]
    lists = {
        one.model_version: {user: expected(one, Request(user, k=5))[0] for user in users}
        | {"i03": [item.item_id for item in one.similar("i03", Request(k=5))]}
        for one in both
    }
    assert all(lists[old][user] != lists[new][user] for user in users)
    stop, failures = threading.Event(), []
    versions: list[list[str]] = [[], [], []]  # those that answered each load, in order

    def load(kind: int) -> None:
        seen = versions[kind]
        with httpx.Client(base_url=address, timeout=30) as client:
            while not stop.is_set():
                user = users[len(seen) % len(users)]
                body: dict[str, Any] = {"user_id": user, "k": 5}
                if kind == 1:  # one that no cache has
                    body["filter"] = {"deny": [f"{kind} {len(seen)}"]}
                if kind == 2:
                    user, response = "i03", client.get("/v1/similar/i03?k=5")
                else:
                    response = client.post("/v1/recommend", json=body)
                if response.status_code != 200:
                    failures.append(response.text)
                    return
                answer = response.json()
                seen.append(answer["model_version"])
                if ids(answer) != lists[seen[-1]][user]:
                    failures.append(f"{user}: not the list of {seen[-1]}: {ids(answer)}")
                time.sleep(0.01)

    def all_answered_by(version: str) -> bool:
        return bool(failures) or all(seen and seen[-1] == version for seen in versions)

    with httpx.Client(base_url=address, timeout=30) as client, ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load, kind) for kind in range(3)]
        try:
            wait_until(lambda: all_answered_by(old))
            for swap in range(SWAPS):
                publish(plain_checkpoint if swap % 2 else other_checkpoint, served)
                wanted = old if swap % 2 else new
                wait_until(lambda wanted=wanted: live(client) == {wanted: 1})
                wait_until(lambda wanted=wanted: all_answered_by(wanted))
        finally:
            stop.set()
        for one in loads:
            one.result(30)
    assert failures == []
    for seen in versions:
        assert sum(before != after for before, after in zip(seen, seen[1:], strict=False)) == SWAPS
        assert seen[-1] == old and len(seen) > 2 * SWAPS


@pytest.mark.ray
def test_a_rollback_and_a_refusal_on_ray_serve(address, served, plain_checkpoint, other_checkpoint, broken_checkpoint):
    with httpx.Client(base_url=address, timeout=30) as client:
        before = live(client)
        publish(other_checkpoint, served, 0.25)
        wait_until(lambda: len(live(client)) == 2)
        split = [recommend(client, user_id=user, k=1)["model_version"] for user in PEOPLE[:100]]
        assert set(split) == {name(plain_checkpoint), name(other_checkpoint)}
        roll_back(served)
        wait_until(lambda: live(client) == before)
        told = json.loads(served.read_text())
        bad = {"checkpoint": str(broken_checkpoint), "model_version": name(broken_checkpoint)}
        served.write_text(json.dumps(told | {"live": [told["live"][0] | bad]}))
        wait_until(lambda: states(client) == [(name(plain_checkpoint), "live"), (bad["model_version"], "refused")])
        assert recommend(client, user_id="u003")["model_version"] == name(plain_checkpoint)
