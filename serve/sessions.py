"""Live histories: what users have done since the model was trained, shared by all replicas.

On one machine they are in a file of SQLite, otherwise in Redis. Of a user the newest events are kept as one row, in the
order of their times, events of one time in that of their arrival. Users that are not heard of for long are forgotten,
and the oldest of them where there are too many.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from mvrec_core.config import ServeConfig
from mvrec_core.errors import ResourceError, StateUnavailable
from mvrec_core.requests import Event
from serve.redis_client import RedisClient

READ_WITHIN_S = 0.05  # a reader never waits for a writer, only for a file that is just being set up
WRITE_WITHIN_S = 1.0  # until the writers of other replicas are done
SET_UP_WITHIN_S = 10.0
TABLES = """
CREATE TABLE IF NOT EXISTS histories (user_id TEXT PRIMARY KEY, changed REAL NOT NULL, events TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_age ON histories (changed);
"""


class LiveEvent(NamedTuple):
    """An event as it is kept: timestamp in Unix seconds; event_id is the client's name of it."""

    item_id: str
    timestamp: float
    values: Mapping[str, Any]
    event_id: str | None = None

    def event(self) -> Event:
        return Event(self.item_id, self.timestamp, self.values)

    def identity(self) -> Hashable:
        """Two events of one user are the same where their event_id is, or without one where all else is."""
        if self.event_id is not None:
            return self.event_id
        return self.item_id, self.timestamp, repr(sorted(self.values.items()))


@dataclass(frozen=True)
class Appended:
    """accepted: events that were new; duplicates: those that were there already; live: all that are kept now."""

    accepted: int
    duplicates: int
    live: int


@dataclass(frozen=True)
class Forgotten:
    """forgotten: events that were there; live: all that are kept now."""

    forgotten: int
    live: int


class Sessions(Protocol):
    """A store of live histories; all methods raise StateUnavailable."""

    async def read(self, user_id: str) -> str:
        """The user's row, to be read by live_events; empty where there is none."""
        ...

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> Appended: ...

    async def forget(self, user_id: str, event_ids: Collection[str] | None = None) -> Forgotten:
        """The events of these names, or all."""
        ...


def open_sessions(settings: ServeConfig, run: str, redis: RedisClient | None) -> Sessions:
    """The store that the settings name; `run` keeps those of different runs apart in one Redis.

    Raises ResourceError where the file cannot be written.
    """
    limits = (settings.live_events, settings.live_users, settings.live_ttl_s)
    if redis is not None:
        return RedisSessions(redis, run, *limits)
    return FileSessions(Path(settings.state_dir or "state"), *limits)


def live_events(row: str) -> tuple[Event, ...]:
    return tuple(event.event() for event in _read(row))


def newest_event(row: str) -> tuple[Event, ...]:
    """The last of live_events, without reading the others."""
    return live_events(row.rpartition("\n")[2])


def joined(row: str, new: Sequence[LiveEvent], max_events: int) -> tuple[str, Appended]:
    """A user's row with new events: without those that it holds already, and with the newest `max_events` alone."""
    events = _read(row)
    known = {event.identity() for event in events}
    before = len(known)
    for event in new:
        if event.identity() not in known:
            known.add(event.identity())
            events.append(event)
    kept = sorted(events, key=lambda event: event.timestamp)[-max_events:]
    accepted = len(known) - before
    return _written(kept), Appended(accepted, len(new) - accepted, len(kept))


def without(row: str, event_ids: Collection[str] | None) -> tuple[str, Forgotten]:
    """A user's row without the events of these names, or without any."""
    events = _read(row)
    kept = [event for event in events if event_ids is not None and event.event_id not in event_ids]
    return _written(kept), Forgotten(len(events) - len(kept), len(kept))


def _written(events: Sequence[LiveEvent]) -> str:
    return "\n".join(json.dumps(event, separators=(",", ":")) for event in events)


def _read(row: str) -> list[LiveEvent]:
    return [LiveEvent(*json.loads(line)) for line in row.split("\n") if line]


class FileSessions:
    """In SQLite's write-ahead mode: processes of one machine read while another writes. Not for network drives."""

    def __init__(self, folder: Path, max_events: int, max_users: int, ttl_s: float):
        self.max_events, self.max_users, self.ttl_s = max_events, max_users, ttl_s
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people did is nobody else's business
            self._reader = _connect(folder / "live.sqlite3")
            self._writer = _connect(folder / "live.sqlite3")
            self._reader.execute(f"PRAGMA busy_timeout = {int(1000 * READ_WITHIN_S)}")
            self._writer.execute(f"PRAGMA busy_timeout = {int(1000 * WRITE_WITHIN_S)}")
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(
                f"cannot keep live events in {folder}: {error}; set serve.state_dir or serve.redis_url"
            ) from None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="live")

    async def read(self, user_id: str) -> str:
        """On the caller's own thread: a row by its key takes less than the way to another thread and back."""
        query = "SELECT events FROM histories WHERE user_id = ? AND changed > ?"
        try:
            row = self._reader.execute(query, (user_id, time.time() - self.ttl_s)).fetchone()
        except sqlite3.Error as error:
            raise StateUnavailable(f"live events cannot be read: {error}") from error
        return row[0] if row else ""

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> Appended:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._append, user_id, events)
        except sqlite3.Error as error:
            raise StateUnavailable(f"live events cannot be written: {error}") from error

    def _append(self, user_id: str, events: Sequence[LiveEvent]) -> Appended:
        now = time.time()
        with self._writer as writer:  # which commits, or rolls back
            writer.execute("BEGIN IMMEDIATE")  # a reader's lock could not be changed into a writer's
            writer.execute("DELETE FROM histories WHERE changed <= ?", (now - self.ttl_s,))
            row = writer.execute("SELECT events FROM histories WHERE user_id = ?", (user_id,)).fetchone()
            text, appended = joined(row[0] if row else "", events, self.max_events)
            writer.execute("INSERT OR REPLACE INTO histories VALUES (?, ?, ?)", (user_id, now, text))
            if row is None:
                surplus = writer.execute("SELECT count(*) FROM histories").fetchone()[0] - self.max_users
                oldest = "SELECT user_id FROM histories ORDER BY changed LIMIT ?"
                writer.execute(f"DELETE FROM histories WHERE user_id IN ({oldest})", (max(0, surplus),))
        return appended

    async def forget(self, user_id: str, event_ids: Collection[str] | None = None) -> Forgotten:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._forget, user_id, event_ids)
        except sqlite3.Error as error:
            raise StateUnavailable(f"live events cannot be written: {error}") from error

    def _forget(self, user_id: str, event_ids: Collection[str] | None) -> Forgotten:
        with self._writer as writer:
            writer.execute("BEGIN IMMEDIATE")
            row = writer.execute("SELECT events FROM histories WHERE user_id = ?", (user_id,)).fetchone()
            text, forgotten = without(row[0] if row else "", event_ids)
            if text:
                writer.execute("UPDATE histories SET events = ? WHERE user_id = ?", (text, user_id))
            else:
                writer.execute("DELETE FROM histories WHERE user_id = ?", (user_id,))
        return forgotten


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=SET_UP_WITHIN_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # whole after any crash; the last rows may go with the power
    connection.executescript(TABLES)
    return connection


class RedisSessions:
    """A key a user, and one sorted set of the users by when they were last heard of."""

    def __init__(self, redis: RedisClient, run: str, max_events: int, max_users: int, ttl_s: float):
        self.redis = redis
        self.max_events, self.max_users, self.ttl_s = max_events, max_users, ttl_s
        self._prefix = f"mvrec:{run}:live:"
        self._users = f"mvrec:{run}:users"

    async def read(self, user_id: str) -> str:
        return (await self.redis.get(self._prefix + user_id) or b"").decode()

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> Appended:
        return await self.redis.call(lambda redis: self._append(redis, user_id, events))

    async def _append(self, redis: Redis, user_id: str, events: Sequence[LiveEvent]) -> Appended:
        key, now, ttl_ms = self._prefix + user_id, time.time(), int(1000 * self.ttl_s)
        appended = Appended(0, 0, 0)

        async def change(pipe: Pipeline) -> None:  # again where another replica has changed the key meanwhile
            nonlocal appended
            row = cast("bytes | None", await pipe.get(key))
            text, appended = joined((row or b"").decode(), events, self.max_events)
            pipe.multi()
            pipe.set(key, text, px=ttl_ms)
            pipe.zadd(self._users, {user_id: now})
            pipe.zremrangebyscore(self._users, "-inf", now - self.ttl_s)
            pipe.pexpire(self._users, ttl_ms)
            pipe.zrange(self._users, 0, -self.max_users - 1)

        oldest = (await redis.transaction(change, key))[-1]
        if oldest:
            async with redis.pipeline() as pipe:
                pipe.delete(*(self._prefix + user.decode() for user in oldest))
                pipe.zrem(self._users, *oldest)
                await pipe.execute()
        return appended

    async def forget(self, user_id: str, event_ids: Collection[str] | None = None) -> Forgotten:
        return await self.redis.call(lambda redis: self._forget(redis, user_id, event_ids))

    async def _forget(self, redis: Redis, user_id: str, event_ids: Collection[str] | None) -> Forgotten:
        key, forgotten = self._prefix + user_id, Forgotten(0, 0)

        async def change(pipe: Pipeline) -> None:  # again where another replica has changed the key meanwhile
            nonlocal forgotten
            row = cast("bytes | None", await pipe.get(key))
            text, forgotten = without((row or b"").decode(), event_ids)
            pipe.multi()
            if text:
                pipe.set(key, text, keepttl=True)
            else:
                pipe.delete(key)
                pipe.zrem(self._users, user_id)

        await redis.transaction(change, key)
        return forgotten
