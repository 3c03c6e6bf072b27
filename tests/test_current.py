"""Replicas that share items and rules: two of them over the same store, a file or a real Redis."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading

import pytest
import tiny
from redis_server import RedisServer, needs_redis

from mvrec_core.answers import Answer, Withheld
from mvrec_core.errors import ConfigError, RequestError, ResourceError, StateUnavailable
from mvrec_core.requests import Item, Request
from serve import items as items_module
from serve.current import Current
from serve.items import FileItems, RedisItems
from serve.redis_client import RedisClient
from serve.rules import AuditLog, rules_file

NEW = Item("新片", {"title": "流浪地球 3", "genres": ["科幻"], "year": 2030}, "新片 (2030)")


pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["file", pytest.param("redis", marks=needs_redis)])
def opened(request, tmp_path):
    """Opens a store, any number of times the same one, as replicas do."""

    def store():
        if request.param == "file":
            return FileItems(tmp_path)
        return RedisItems(RedisClient(request.getfixturevalue("server").url), tmp_path.name)

    return store


def ids(recommender, **limits):
    return [item.item_id for item in recommender.recommend([Request(None, k=5, **limits)])[0].items]


ONLY = {"allow": frozenset({"新片", "i03", "i98"})}


def test_what_one_replica_is_told_the_other_recommends_next(opened, plain_recommender):
    async def scenario():
        one, other = (Current(plain_recommender, opened(), None) for _ in range(2))
        assert (await other.catch_up()).n_items == tiny.ITEMS
        first = (await one.put([NEW, Item("i98", {})])).items_version
        now = await other.catch_up()
        assert (now.items_version, now.n_items) == (first, tiny.ITEMS + 2)
        assert ids(now, **ONLY) == ids(one.recommender, **ONLY) == ["i03", "i98", "新片"]
        await other.put([Item("i03"), Item("i98")])
        assert ids(await one.catch_up(), **ONLY) == ["新片"]
        assert (await one.catch_up()) is one.recommender  # nothing new, nothing done
        late = Current(plain_recommender, opened(), None)
        assert ids(await late.catch_up(), **ONLY) == ["新片"] and late.recommender.items_version == first + 1

    asyncio.run(scenario())


def test_many_who_come_at_once_wait_for_one_change(opened, plain_recommender):
    async def scenario():
        one, other = (Current(plain_recommender, opened(), None) for _ in range(2))
        await asyncio.gather(*(one.put([Item(f"n{n}", {"title": f"film {n}"})]) for n in range(5)))
        found = await asyncio.gather(*(other.catch_up() for _ in range(20)))
        assert len({id(recommender) for recommender in found}) == 1
        assert found[0].items_version == one.recommender.items_version and found[0].n_items == tiny.ITEMS + 5

    asyncio.run(scenario())


def test_nobody_waits_for_the_texts_of_new_items_but_removed_ones_go_first(opened, plain_recommender, monkeypatch):
    monkeypatch.setattr("serve.current.PATIENCE_S", 0.05)

    async def scenario():
        one, other = (Current(plain_recommender, opened(), None) for _ in range(2))
        await other.catch_up()
        free, whole = threading.Event(), other._with_items
        other._with_items = lambda *args: free.wait(20) and whole(*args)
        await one.put([NEW])
        await one.put([Item("i03")])
        assert ids(await other.catch_up(), allow=frozenset({"新片", "i03", "i04"}))[-1] in ("i03", "i04")
        while other.recommender.items_version == 0:
            await asyncio.sleep(0.01)
        now = await other.catch_up()
        assert ids(now, allow=frozenset({"新片", "i03", "i04"})) == ["i04"]
        free.set()
        assert ids(await other.follow(), **ONLY) == ["新片"]
        assert other.recommender.version != now.version != plain_recommender.version

    asyncio.run(scenario())


def test_a_wrong_value_is_refused_before_it_is_stored(opened, plain_recommender):
    async def scenario():
        current = Current(plain_recommender, opened(), None)
        with pytest.raises(RequestError, match="'year': expected a number"):
            await current.put([NEW, Item("i98", {"year": "soon"})])
        assert await opened().version() == 0

    asyncio.run(scenario())


def test_an_item_that_this_model_cannot_read_does_not_keep_the_others_out(opened, plain_recommender):
    async def scenario():
        await opened().put([Item("i98", {"year": "soon"}), NEW])  # a model without the view took it
        now = await Current(plain_recommender, opened(), None).catch_up()
        assert ids(now, **ONLY) == ["i03", "新片"] and now.items_version > 0

    asyncio.run(scenario())


def test_the_store_is_bounded(opened, monkeypatch):
    monkeypatch.setattr(items_module, "MAX_ITEMS", 3)

    async def scenario():
        store = opened()
        first = await store.put([Item("a"), Item("b"), Item("c")])
        second = await store.put([Item("a", {}), Item("c", {})])
        with pytest.raises(RequestError, match="at most 3") as error:
            await store.put([Item("a"), Item("d")])
        assert error.value.status == 507
        version, items = await store.since(first)
        assert (version, sorted(item.item_id for item in items)) == (second, ["a", "c"])

    asyncio.run(scenario())


@needs_redis
def test_without_redis_answers_go_on_and_changes_are_refused(tmp_path, plain_recommender):
    server = RedisServer(tmp_path)

    async def scenario():
        one, other = (Current(plain_recommender, RedisItems(RedisClient(server.url), "x"), None) for _ in range(2))
        await one.put([NEW])
        await other.catch_up()
        server.kill()
        assert ids(await one.catch_up(), **ONLY) == ["i03", "新片"]
        with pytest.raises(StateUnavailable):
            await one.put([Item("i98", {})])
        server.start()  # with nothing in it
        await asyncio.sleep(1.1)
        await one.put([Item("i98", {})])
        assert ids(await other.catch_up(), **ONLY) == ["i03", "i98"]

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="set serve.state_dir or serve.redis_url"):
        FileItems(tmp_path / "file")


# rules


def write(path, text, second):
    path.write_text(text, encoding="utf-8")
    os.utime(path, (second, second))


def test_rules_are_followed_when_their_file_changes(tmp_path, plain_recommender, monkeypatch, caplog):
    monkeypatch.setattr("serve.live_file.LOOK_EVERY_S", 0.0)
    file = tmp_path / "rules.yaml"
    write(file, "block: [{why: recalled, items: [i03]}]", 1)

    async def scenario():
        current = Current(plain_recommender, FileItems(tmp_path), rules_file(file))
        assert ids(await current.catch_up(), **ONLY) == []
        await current.put([NEW])
        write(file, "block: [{why: 太新, ranges: {year: {min: 2025}}}]", 2)
        answer = (await current.catch_up()).recommend([Request(None, **ONLY)])[0]
        assert [item.item_id for item in answer.items] == ["i03"] and answer.withheld == (Withheld("新片", "太新"),)
        for second, text in enumerate(("block: [{why: x, itms: []}]", "block: [{why: x, categories: {genre: []}}]"), 3):
            caplog.clear()
            write(file, text, second)
            for _ in range(3):
                assert ids(await current.catch_up(), **ONLY) == ["i03"]
            assert len(set(map(id, caplog.records))) == 1 and "the rules stay as they were" in caplog.text
        file.unlink()
        assert ids(await current.catch_up(), **ONLY) == ["i03"]
        write(file, "", 9)
        assert ids(await current.catch_up(), **ONLY) == ["i03", "新片"]

    with caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        asyncio.run(scenario())


def test_rules_that_are_wrong_from_the_start_are_refused(tmp_path, plain_recommender):
    file = tmp_path / "rules.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        rules_file(file)
    write(file, "block: [{why: x, categories: {genre: [a]}}]", 1)
    with pytest.raises(ConfigError, match="did you mean 'genres'"):
        Current(plain_recommender, FileItems(tmp_path), rules_file(file))


def test_the_audit_log_says_what_was_withheld_and_why(tmp_path):
    log = AuditLog(tmp_path / "new" / "withheld.jsonl")
    log.write(Answer("history", [], 0), "v1")
    log.write(Answer("history", [], 0, None, (Withheld("i03", "召回"), Withheld("i04", "x"))), "v1")
    lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert [(line["item_id"], line["why"], line["model_version"]) for line in lines] == [
        ("i03", "召回", "v1"),
        ("i04", "x", "v1"),
    ]
    assert lines[0]["time"] > 1.7e9
