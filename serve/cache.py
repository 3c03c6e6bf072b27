"""Answers by what they rest on: remembered in this process and, where there is Redis, for all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from cachetools import TTLCache

from mvrec_core.errors import StateUnavailable
from serve.redis_client import RedisClient

KEY_BYTES = 300  # of memory that an entry takes beside its value
SLOTS = 2**16  # keys in Redis at most: a digest has its one slot, and the next to need it takes it over
LONGEST_IN_REDIS = 2**16  # bytes
LATELY = 0.02  # what the newest look-up counts in `useful`: the last fifty make most of it


class Cache:
    """At most `max_bytes` of values, those used last, each for at most `ttl_s` seconds. To be used from one event loop.

    heard: is told of each look-up: "near" or "far" (Redis) where it was found, "joined" where another one is already
    computing it, "miss"

    A key has to change with everything that the value rests on: nothing is ever taken back.
    """

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        redis: RedisClient | None = None,
        run: str = "",
        heard: Callable[[str], None] = lambda result: None,
    ):
        self.ttl_s = ttl_s
        self.useful = 0.0  # the share of the look-ups of late that nothing had to be computed for
        self._told = heard
        self._near: TTLCache[bytes, bytes] = TTLCache(max_bytes, ttl_s, getsizeof=lambda value: len(value) + KEY_BYTES)
        self._redis = redis
        self._prefix = f"mvrec:{run}:answer:"
        self._flights: dict[bytes, _Flight] = {}

    async def get(self, key: bytes, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        """The value of a key of 16 bytes or more. Who asks while it is being computed waits for the same computation,
        which ends when nobody waits any more. Raises what `compute` raises, and remembers no error."""
        if (value := self._near.get(key)) is not None:
            self._heard("near")
            return value
        flight = self._flights.get(key)
        if flight is not None:
            self._heard("joined")
        else:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._fetch(key, compute)))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                del self._flights[key]
                flight.task.cancel()

    def _heard(self, result: str) -> None:
        self.useful += LATELY * ((result != "miss") - self.useful)
        self._told(result)

    async def _fetch(self, key: bytes, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        value = await self._far(key)
        self._heard("miss" if value is None else "far")
        if value is None:
            value = await compute()
            await self._keep_far(key, value)
        if len(value) + KEY_BYTES <= self._near.maxsize:
            self._near[key] = value
        return value

    async def _far(self, key: bytes) -> bytes | None:
        if self._redis is None:
            return None
        try:
            found = await self._redis.get(self._slot(key))
        except StateUnavailable:
            return None
        return found[len(key) :] if found is not None and found.startswith(key) else None

    async def _keep_far(self, key: bytes, value: bytes) -> None:
        if self._redis is None or len(value) > LONGEST_IN_REDIS:
            return
        with suppress(StateUnavailable):
            await self._redis.call(lambda redis: redis.set(self._slot(key), key + value, px=int(1000 * self.ttl_s)))

    def _slot(self, key: bytes) -> str:
        return f"{self._prefix}{int.from_bytes(key[:8]) % SLOTS}"


class _Flight:
    """A computation under way, and how many wait for it."""

    def __init__(self, task: asyncio.Task[bytes]):
        self.task = task
        self.waiting = 0
