"""Live histories, in the file of SQLite and in a real Redis: the same behaviour, asked of both."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from pathlib import Path

import pytest
from redis import Redis
from redis_server import RedisServer, needs_redis

from mvrec_core.errors import ConfigError, ResourceError, StateUnavailable
from mvrec_core.requests import Event
from serve.redis_client import RedisClient
from serve.sessions import FileSessions, LiveEvent, RedisSessions, Sessions, joined, live_events, newest_event

KINDS = ["file", pytest.param("redis", marks=needs_redis)]


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    """Opens a store, any number of times the same one, as replicas do: max_events, max_users, ttl_s."""

    def opened(max_events: int = 10, max_users: int = 100, ttl_s: float = 60.0):
        limits = (max_events, max_users, ttl_s)
        if request.param == "file":
            return FileSessions(tmp_path, *limits)
        url = request.getfixturevalue("server").url
        return RedisSessions(RedisClient(url), tmp_path.name, *limits)

    return opened


def click(item: str, at: float, event_id: str | None = None, **values) -> LiveEvent:
    return LiveEvent(item, at, values, event_id)


async def read(sessions: Sessions, user_id: str) -> tuple[Event, ...]:
    return live_events(await sessions.read(user_id))


def items(events) -> list[str]:
    return [event.item_id for event in events]


def test_what_one_replica_appends_another_reads(store):
    async def scenario():
        one, other = store(), store()
        assert await read(other, "用户") == ()
        appended = await one.append(
            "用户", [click("甲", 5.0, rating=4), click("no such item", 6.5, tags=["a", "电影"])]
        )
        assert (appended.accepted, appended.duplicates, appended.live) == (2, 0, 2)
        assert await read(other, "用户") == (
            Event("甲", 5.0, {"rating": 4}),
            Event("no such item", 6.5, {"tags": ["a", "电影"]}),
        )
        assert await read(one, "nobody") == await read(one, "") == ()

    asyncio.run(scenario())


def test_order_is_by_time_and_then_by_arrival(store):
    async def scenario():
        sessions = store()
        await sessions.append("u", [click("late", 9.0), click("a", 5.0)])
        await sessions.append("u", [click("b", 5.0), click("early", 1.0), click("c", 5.0)])
        assert items(await read(sessions, "u")) == ["early", "a", "b", "c", "late"]

    asyncio.run(scenario())


def test_an_event_is_taken_once(store):
    async def scenario():
        sessions = store()
        await sessions.append("u", [click("a", 5.0, "n1"), click("b", 6.0, rating=3)])
        again = [click("other", 7.0, "n1"), click("b", 6.0, rating=3), click("b", 6.0, rating=4), click("b", 6.5, "n2")]
        appended = await sessions.append("u", [*again, again[-1]])
        assert (appended.accepted, appended.duplicates, appended.live) == (2, 3, 4)
        assert [(e.item_id, e.values) for e in await read(sessions, "u")] == [
            ("a", {}),
            ("b", {"rating": 3}),
            ("b", {"rating": 4}),
            ("b", {}),
        ]
        assert (await sessions.append("someone else", [click("a", 5.0, "n1")])).accepted == 1

    asyncio.run(scenario())


def test_the_newest_events_of_the_users_heard_of_last(store):
    async def scenario():
        sessions = store(max_events=3, max_users=2)
        await sessions.append("u", [click(str(n), n) for n in (5, 1, 4, 2, 3)])
        assert items(await read(sessions, "u")) == ["3", "4", "5"]
        await sessions.append("v", [click("v", 1)])
        await sessions.append("u", [click("6", 6)])  # u is now the one heard of last
        await sessions.append("w", [click("w", 1)])
        assert [len(await read(sessions, user)) for user in "uvw"] == [3, 0, 1]

    asyncio.run(scenario())


def test_users_are_forgotten_some_time_after_their_last_event(store):
    async def scenario():
        sessions = store(ttl_s=0.6)
        await sessions.append("u", [click("a", 1)])
        await sessions.append("v", [click("a", 1)])
        await asyncio.sleep(0.4)
        await sessions.append("v", [click("b", 2)])
        await asyncio.sleep(0.4)
        assert (await read(sessions, "u"), items(await read(sessions, "v"))) == ((), ["a", "b"])
        assert (await sessions.append("u", [click("c", 3)])).live == 1  # not with what was forgotten

    asyncio.run(scenario())


def test_appends_at_the_same_time_are_all_kept(store):
    async def scenario():
        replicas = [store(max_events=100), store(max_events=100), store(max_events=100)]
        calls = [replicas[n % 3].append("u", [click(str(n), n)]) for n in range(30)]
        assert all(appended.accepted == 1 for appended in await asyncio.gather(*calls))
        assert items(await read(replicas[0], "u")) == [str(n) for n in range(30)]

    asyncio.run(scenario())


def test_the_newest_event_is_the_last_of_a_row():
    row, _ = joined("", [click("甲\n", 5.0, text="一\u2028\n二"), click("乙", 7.0), click("丙", 6.0)], 10)
    assert newest_event(row) == live_events(row)[-1:] == (Event("乙", 7.0, {}),)
    assert newest_event("") == ()


@pytest.mark.parametrize("names", [None, {"甲", "nobody"}, {"甲", "2"}])
def test_what_is_forgotten_is_gone_for_all_replicas(store, names):
    async def scenario():
        one, other = store(max_events=10), store(max_events=10)
        events = [LiveEvent("a", 1.0, {}, "甲"), LiveEvent("b", 2.0, {}, "2"), LiveEvent("c", 3.0, {})]
        await one.append("u", events)
        await one.append("v", events)
        gone = 3 if names is None else 2 if "2" in names else 1
        found = await one.forget("u", names)
        assert (found.forgotten, found.live) == (gone, 3 - gone)
        kept = [] if names is None else [e.item_id for e in events if e.event_id not in names]
        assert items(await read(other, "u")) == kept and items(await read(other, "v")) == ["a", "b", "c"]
        assert (await other.forget("nobody", names)).forgotten == 0
        assert (await other.append("u", events)).accepted == gone  # a name that was forgotten may come again

    asyncio.run(scenario())


def test_a_row_is_short_and_plain():
    row, _ = joined("", [click("甲", 5.0, rating=4)], 10)
    assert json.loads(row) == ["甲", 5.0, {"rating": 4}, None]
    assert joined(row, [click("b", 4.0)], 1)[0] == row


# the file


def _append_many(folder: Path, name: str) -> None:
    async def scenario():
        sessions = FileSessions(folder, 1000, 1000, 60.0)
        for n in range(50):
            await sessions.append("shared", [click(f"{name}{n}", n)])

    asyncio.run(scenario())


def test_processes_share_the_file(tmp_path):
    context = multiprocessing.get_context("fork")  # fresh ones would first import torch
    writers = [context.Process(target=_append_many, args=(tmp_path / "new", name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    events = asyncio.run(read(FileSessions(tmp_path / "new", 1000, 1000, 60.0), "shared"))
    assert len(set(items(events))) == 100
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot keep live events in .*file.*set serve.state_dir"):
        FileSessions(tmp_path / "file", 1, 1, 1.0)
    (tmp_path / "live.sqlite3").write_text("not a data base at all" * 100)
    with pytest.raises(ResourceError, match="not a database"):
        FileSessions(tmp_path, 1, 1, 1.0)


def test_a_failed_append_leaves_the_file_usable(tmp_path):
    async def scenario():
        sessions = FileSessions(tmp_path, 100, 10, 60.0)
        sessions._writer.execute("PRAGMA max_page_count = 12")  # as if the disk were full
        with pytest.raises(StateUnavailable, match="cannot be written"):
            await sessions.append("u", [click("x" * 1000, n) for n in range(100)])
        assert await read(sessions, "u") == ()
        assert (await sessions.append("u", [click("a", 1)])).live == 1

    asyncio.run(scenario())


# Redis that goes and comes back


async def _eventually(call, within_s: float = 5.0):
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await call()
        except StateUnavailable:
            assert time.monotonic() < deadline, "Redis has not been found again"
            await asyncio.sleep(0.05)


async def _unavailable_after(sessions) -> float:
    start = time.monotonic()
    with pytest.raises(StateUnavailable):
        await read(sessions, "u")
    return time.monotonic() - start


@needs_redis
@pytest.mark.parametrize("away", ["killed", "frozen"])
def test_a_dead_redis_costs_next_to_nothing_and_is_found_again(tmp_path, away):
    server = RedisServer(tmp_path)

    async def scenario():
        sessions = RedisSessions(RedisClient(server.url), "run", 10, 10, 60.0)
        await sessions.append("u", [click("a", 1)])
        server.kill() if away == "killed" else server.freeze()
        first = [await _unavailable_after(sessions) for _ in range(3)]
        assert max(first) < 1.0
        later = [await _unavailable_after(sessions) for _ in range(100)]
        assert sum(later) / len(later) < 0.002
        with pytest.raises(StateUnavailable, match="cannot be reached"):
            await sessions.append("u", [click("b", 2)])
        server.start() if away == "killed" else server.thaw()
        assert (await _eventually(lambda: sessions.append("u", [click("c", 3)]))).accepted == 1
        assert items(await read(sessions, "u"))[-1] == "c"
        await sessions.redis.close()

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:many/0", "http://127.0.0.1:6379"])
def test_an_address_that_is_none(url):
    with pytest.raises(ConfigError, match="serve.redis_url: "):
        RedisClient(url)


@needs_redis
def test_a_quick_restart_is_not_noticed(tmp_path):
    server = RedisServer(tmp_path)

    async def scenario():
        sessions = RedisSessions(RedisClient(server.url), "run", 10, 10, 60.0)
        await asyncio.gather(*(sessions.append(str(n), [click("a", 1)]) for n in range(8)))
        server.kill()
        server.start()
        assert await asyncio.gather(*(sessions.read(str(n)) for n in range(8))) == [""] * 8

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


@needs_redis
def test_redis_that_refuses_to_write_still_reads(server):
    async def scenario():
        sessions = RedisSessions(RedisClient(server.url), "full", 10, 10, 60.0)
        await sessions.append("u", [click("a", 1)])
        with Redis.from_url(server.url) as admin:
            admin.config_set("maxmemory", 1)
            try:
                for _ in range(5):
                    with pytest.raises(StateUnavailable, match="Redis refuses: .*memory"):
                        await sessions.append("u", [click("b", 2)])
                assert items(await read(sessions, "u")) == ["a"]
            finally:
                admin.config_set("maxmemory", 0)

    asyncio.run(scenario())


@needs_redis
def test_every_key_in_redis_has_an_end(server):
    async def scenario():
        sessions = RedisSessions(RedisClient(server.url), "ends", 10, 2, 60.0)
        for n in range(5):
            await sessions.append(f"用户{n}", [click("a", 1)])

    asyncio.run(scenario())
    with Redis.from_url(server.url) as admin:
        keys = sorted(key.decode() for key in admin.scan_iter("mvrec:ends:*"))
        assert keys == ["mvrec:ends:live:用户3", "mvrec:ends:live:用户4", "mvrec:ends:users"]
        assert all(0 < admin.pttl(key) <= 60_000 for key in keys)
