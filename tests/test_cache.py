"""What is remembered: answers in the process and in a real Redis, user vectors in the Recommender."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from redis import Redis
from redis_server import RedisServer, needs_redis

from mvrec_core import ranking
from mvrec_core.attributes import Between, OneOf
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Event, Item, Request, digest
from mvrec_core.rules import Rule, Rules
from serve.cache import KEY_BYTES, SLOTS, Cache
from serve.redis_client import RedisClient


class Counted:
    """Computes a value, now and then slowly, and counts how often."""

    def __init__(self, value: bytes = b"answer", delay_s: float = 0.0):
        self.value, self.delay_s, self.started, self.finished = value, delay_s, 0, 0

    async def __call__(self) -> bytes:
        self.started += 1
        await asyncio.sleep(self.delay_s)
        self.finished += 1
        return self.value


def key(n: object) -> bytes:
    return digest(n)


def test_a_value_is_computed_once_for_its_time():
    async def scenario():
        cache, compute = Cache(10_000, ttl_s=0.3), Counted()
        assert [await cache.get(key(1), compute) for _ in range(3)] == [b"answer"] * 3
        assert compute.started == 1
        await cache.get(key(2), compute)
        assert compute.started == 2
        await asyncio.sleep(0.35)
        await cache.get(key(1), compute)
        assert compute.started == 3

    asyncio.run(scenario())


def test_how_many_need_no_computing_of_late():
    async def scenario():
        cache, compute = Cache(10**6, ttl_s=60), Counted()
        assert cache.useful == 0
        for _ in range(200):
            await cache.get(key(1), compute)
        assert cache.useful > 0.95
        for n in range(200):
            await cache.get(key(("new", n)), compute)
        assert 0 < cache.useful < 0.05

    asyncio.run(scenario())


def test_memory_is_bounded_and_what_was_used_last_stays():
    async def scenario():
        cache, compute = Cache(3 * (KEY_BYTES + 100), ttl_s=60), Counted(b"x" * 100)
        for n in range(2000):
            await cache.get(key(n), compute)
        assert len(cache._near) == 3 and not cache._flights
        for n in (1, 2, 3, 1, 4):
            await cache.get(key(("new", n)), compute)
        before = compute.started
        await cache.get(key(("new", 1)), compute)
        assert compute.started == before
        await cache.get(key(("new", 2)), compute)
        assert compute.started == before + 1

    asyncio.run(scenario())


@pytest.mark.parametrize("max_bytes", [0, KEY_BYTES + 5])
def test_what_has_no_room_is_answered_all_the_same(max_bytes):
    async def scenario():
        cache, compute = Cache(max_bytes, ttl_s=60), Counted()
        assert [await cache.get(key(1), compute) for _ in range(2)] == [b"answer"] * 2
        assert compute.started == 2

    asyncio.run(scenario())


def test_who_asks_for_the_same_shares_one_computation():
    async def scenario():
        cache, compute = Cache(10_000, ttl_s=60), Counted(delay_s=0.05)
        assert await asyncio.gather(*(cache.get(key(1), compute) for _ in range(50))) == [b"answer"] * 50
        assert compute.started == 1 and not cache._flights

    asyncio.run(scenario())


def test_one_who_leaves_does_not_hurt_the_others():
    async def scenario():
        cache, compute = Cache(10_000, ttl_s=60), Counted(delay_s=0.05)
        first, second = (asyncio.create_task(cache.get(key(1), compute)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == b"answer" and compute.started == 1
        alone = asyncio.create_task(cache.get(key(2), compute))
        await asyncio.sleep(0.01)
        alone.cancel()
        await asyncio.sleep(0)
        assert await cache.get(key(2), compute) == b"answer"  # not the cancelled computation
        assert (compute.started, compute.finished) == (3, 2)

    asyncio.run(scenario())


def test_an_error_is_told_to_all_who_wait_and_not_remembered():
    async def scenario():
        calls = 0

        async def fails() -> bytes:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0.01)
            raise ZeroDivisionError

        cache = Cache(10_000, ttl_s=60)
        found = await asyncio.gather(*(cache.get(key(1), fails) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in found] == [ZeroDivisionError] * 3 and calls == 1
        assert await cache.get(key(1), Counted()) == b"answer"

    asyncio.run(scenario())


# the digest


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "用户2"},
        {"user_id": None},
        {"events": (Event("甲"),)},
        {"events": (Event("甲", 5.0, {"rating": 3}),)},
        {"live": (Event("甲", 5.0, {"rating": 4}),), "events": ()},
        {"k": 11},
        {"exclude_seen": False},
        {"allow": frozenset()},
        {"deny": frozenset({"a"})},
        {"explain": True},
        {"where": (OneOf("类型", frozenset({"科幻", "灾难"})),)},
        {"where": (Between("year", 1990),)},
        {"diversity": 0.5},
        {"caps": (("类型", 2),)},
        {"now": 6.0},
    ],
)
def test_a_digest_changes_with_all_of_a_request(change):
    request = Request("用户1", (Event("甲", 5.0, {"rating": 4}),), allow=frozenset({"a", "b"}), now=5.0)
    assert digest("v1", replace(request, **change)) != digest("v1", request) != digest("v2", request)


def test_a_digest_is_the_same_in_every_process():
    parts = ("甲", 5.0, frozenset(map(str, range(50))), Event("乙", None, {"b": 1, "a": [None]}))
    assert digest(*parts).hex() == "6d31c3533c1e7b99abf2af067bc9c65c"


# Redis behind it


@needs_redis
def test_replicas_share_what_is_in_redis_and_do_without(tmp_path):
    server = RedisServer(tmp_path)

    async def scenario():
        caches = [Cache(10_000, 60, RedisClient(server.url), "run") for _ in range(3)]
        compute = Counted("答案".encode())
        assert await caches[0].get(key(1), compute) == await caches[1].get(key(1), compute) == "答案".encode()
        assert compute.started == 1
        with Redis.from_url(server.url) as admin:
            (slot,) = admin.keys()
            assert 0 < admin.pttl(slot) <= 60_000
            admin.set(slot, key(2) + b"another's")  # whose digest falls on the same slot
        assert await caches[2].get(key(1), compute) == "答案".encode() and compute.started == 2
        server.kill()
        start = time.monotonic()
        for n in range(200):
            assert await caches[0].get(key(("away", n)), compute) == "答案".encode()
        assert time.monotonic() - start < 1.0

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


@needs_redis
def test_keys_in_redis_are_bounded(tmp_path):
    slots = [int(Cache(0, 60)._slot(key(n)).rpartition(":")[2]) for n in range(5000)]
    assert len(set(slots)) > 4000 and max(slots) < SLOTS
    server = RedisServer(tmp_path)

    async def scenario():
        cache = Cache(10_000, 60, RedisClient(server.url), "run")
        await cache.get(key(1), Counted(b"x" * 100_000))  # too long for others' memory
        with Redis.from_url(server.url) as admin:
            assert admin.dbsize() == 0

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


# user vectors


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of histories that each call of the encoder has read."""
    sizes: list[int] = []
    encode = ranking.encode

    def counted(model, histories, examples, *args):
        sizes.append(len(examples))
        return encode(model, histories, examples, *args)

    monkeypatch.setattr(ranking, "encode", counted)
    return sizes


def test_a_history_is_encoded_once(plain_checkpoint, encoded):
    recommender = Recommender.load(plain_checkpoint)
    recommender.recommend([Request("u003", k=3), Request("u003", k=5), Request("u011", k=3)])
    assert encoded == [2]
    recommender.recommend([Request("u011", k=9, deny=frozenset({"i01"})), Request("u012")])
    assert encoded == [2, 1]
    for other in (
        Request("u003", (Event("i30"),)),
        Request("u003", live=(Event("i30", 2e9),)),
        Request("u003", now=2e9),
    ):
        recommender.recommend([other])
    assert encoded == [2, 1, 1, 1, 1]


def test_remembered_answers_are_those_of_a_fresh_recommender(plain_checkpoint):
    used, fresh = Recommender.load(plain_checkpoint), Recommender.load(plain_checkpoint)
    users = [f"u{n:03d}" for n in range(20)]
    for k in (2, 7):
        used.recommend([Request(user, k=k) for user in users])
    for user in users:
        (again,), (new,) = used.recommend([Request(user, k=5)]), fresh.recommend([Request(user, k=5)])
        assert [i.item_id for i in again.items] == [i.item_id for i in new.items]
        assert [i.score for i in again.items] == pytest.approx([i.score for i in new.items], abs=1e-4)


def test_other_items_make_other_vectors_and_neither_takes_those_of_the_other(plain_checkpoint):
    def scores(recommender: Recommender) -> dict[str, float]:
        answer = recommender.recommend([Request(events=(Event("新片"), Event("i03")), k=38)])[0]
        return {item.item_id: item.score for item in answer.items}

    def put(recommender: Recommender, title: str) -> Recommender:
        return recommender.with_items([Item("新片", {"title": title})], 1)

    used, fresh = Recommender.load(plain_checkpoint), Recommender.load(plain_checkpoint)
    before = scores(used)
    changed = put(used, "流浪地球 3")
    after = scores(changed)
    assert after == pytest.approx(scores(put(fresh, "流浪地球 3")), abs=1e-4) != pytest.approx(before, abs=1e-4)
    assert scores(used) == before and scores(changed) == after


def test_a_version_says_model_items_and_rules(plain_recommender):
    rules = Rules(block=(Rule(why="召回", items=("i03",)),))
    same = plain_recommender.with_rules(Rules()).version
    others = [
        plain_recommender.with_rules(rules).version,
        plain_recommender.with_items([Item("i03")], 7).version,
        plain_recommender.with_items([Item("i03")], 8).version,
        plain_recommender.with_items([Item("i03")], 8).with_rules(rules).version,
    ]
    assert same == plain_recommender.version and len({same, *others}) == 5
    assert plain_recommender.with_rules(rules).with_rules(Rules()).version == same
