"""Redis that may be away: behind a breaker, so that a dead one costs a request next to nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mvrec_core.errors import StateUnavailable

CONNECTIONS = 64
TIMEOUT_S = 0.1  # of one command, of a connection, and of the wait for a free one
FAILURES = 3  # in a row, after which nothing is asked until a ping is answered
PING_EVERY_S = 0.25

T = TypeVar("T")


class RedisClient:
    """A pool of connections. To be used from one event loop; makes no connection before the first call."""

    def __init__(self, url: str):
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once: pooled connections do not survive a restart of Redis
        )
        self._redis = Redis.from_pool(pool)
        self._failures = 0
        self._pings: asyncio.Task[None] | None = None

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """What `command` comes to. Raises StateUnavailable, at once where Redis has been away until now."""
        if self._failures >= FAILURES:
            raise StateUnavailable("Redis cannot be reached; try again")
        try:
            result = await command(self._redis)
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            self._failures += 1
            if self._failures == FAILURES:
                logging.getLogger("ray.serve").warning("Redis cannot be reached: %s", error)
                if self._pings is None or self._pings.done():
                    self._pings = asyncio.create_task(self._ping_until_back())
            raise StateUnavailable("Redis cannot be reached; try again") from error
        except RedisError as error:  # it is there, and refuses: no memory left, a replica that only reads
            raise StateUnavailable(f"Redis refuses: {error}") from error
        self._failures = 0
        return result

    async def close(self) -> None:
        if self._pings is not None:
            self._pings.cancel()
        await self._redis.aclose()

    async def _ping_until_back(self) -> None:
        while self._failures:
            await asyncio.sleep(PING_EVERY_S)
            try:
                await self._redis.ping()
            except (RedisError, OSError):
                continue
            self._failures = 0
            logging.getLogger("ray.serve").warning("Redis is back")
