"""What has been added to the catalogue, changed or removed since the model was trained, shared by all replicas.

On one machine it is in a file of SQLite, otherwise in Redis: a row an item, with the number of the change that wrote
it. A replica asks for the number of the last change before it answers, and reads what is newer than what it has.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from mvrec_core.config import ServeConfig
from mvrec_core.errors import RequestError, ResourceError, StateUnavailable
from mvrec_core.requests import Item
from serve.redis_client import RedisClient

MAX_ITEMS = 100_000  # rows, removals included: a catalogue that changes more should be trained on
CHANGES = 1_000_000  # a store's first change is this times the second of its birth: an emptied one is another
READ_AT_ONCE = 500  # rows of Redis
WAIT_S = 1.0  # for the writers of other replicas
TABLE = """
CREATE TABLE IF NOT EXISTS items (item_id TEXT PRIMARY KEY, change INTEGER NOT NULL, item TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_change ON items (change);
"""


class ItemStore(Protocol):
    """All methods raise StateUnavailable; an item without features has been removed."""

    async def version(self) -> int:
        """The number of the last change, 0 before the first."""
        ...

    async def since(self, version: int) -> tuple[int, list[Item]]:
        """A version, and all items that have changed after another one, each once."""
        ...

    async def put(self, items: Sequence[Item]) -> int:
        """The version with these items. Raises RequestError where the store would get too large."""
        ...


def open_items(settings: ServeConfig, run: str, redis: RedisClient | None) -> ItemStore:
    """The store that the settings name; `run` keeps those of different runs apart in one Redis.

    Raises ResourceError where the file cannot be written.
    """
    return RedisItems(redis, run) if redis is not None else FileItems(Path(settings.state_dir or "state"))


def same_store(version: int, other: int) -> bool:
    """Whether two versions are of one store, so that what is between them is all that has changed."""
    return version // CHANGES == other // CHANGES


def _next(last: int) -> int:
    return last + 1 if last else int(time.time()) * CHANGES


def _text(item: Item) -> str:
    return json.dumps(asdict(item), ensure_ascii=False)


def _check_room(rows: int) -> None:
    if rows > MAX_ITEMS:
        raise RequestError(
            f"items: at most {MAX_ITEMS} can change between two trainings, and this would make {rows}", "items", 507
        )


class FileItems:
    """In SQLite's write-ahead mode: processes of one machine read while another writes. Not for network drives."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = folder / "items.sqlite3"
            self._database = sqlite3.connect(file, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(
                f"cannot keep items in {folder}: {error}; set serve.state_dir or serve.redis_url"
            ) from None
        self._reader = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="items")

    async def version(self) -> int:
        """On the caller's own thread: it takes less than the way to another one and back."""
        try:
            return int(self._reader.execute("SELECT coalesce(max(change), 0) FROM items").fetchone()[0])
        except sqlite3.Error as error:
            raise StateUnavailable(f"changed items cannot be read: {error}") from error

    async def since(self, version: int) -> tuple[int, list[Item]]:
        query = "SELECT change, item FROM items WHERE change > ? ORDER BY change, item_id"
        try:
            rows = await self._run(lambda: self._database.execute(query, (version,)).fetchall())
        except sqlite3.Error as error:
            raise StateUnavailable(f"changed items cannot be read: {error}") from error
        return max((change for change, _ in rows), default=version), [Item(**json.loads(item)) for _, item in rows]

    async def put(self, items: Sequence[Item]) -> int:
        try:
            return await self._run(lambda: self._put(items))
        except sqlite3.Error as error:
            raise StateUnavailable(f"items cannot be written: {error}") from error

    def _put(self, items: Sequence[Item]) -> int:
        with self._database as database:  # which commits, or rolls back
            database.execute("BEGIN IMMEDIATE")
            change = _next(database.execute("SELECT coalesce(max(change), 0) FROM items").fetchone()[0])
            rows = [(item.item_id, change, _text(item)) for item in items]
            database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", rows)
            _check_room(database.execute("SELECT count(*) FROM items").fetchone()[0])
        return change

    async def _run(self, function):  # type: ignore[no-untyped-def]
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


class RedisItems:
    """A hash of the items, a sorted set of them by change, and the number of the last change."""

    def __init__(self, redis: RedisClient, run: str):
        self.redis = redis
        self._items, self._order, self._last = (f"mvrec:{run}:items:{part}" for part in ("rows", "order", "last"))

    async def version(self) -> int:
        return int(await self.redis.call(lambda redis: redis.get(self._last)) or 0)

    async def since(self, version: int) -> tuple[int, list[Item]]:
        last = await self.version()  # first: what is written meanwhile is read twice rather than never
        after = f"({version}"
        ids = await self.redis.call(lambda redis: redis.zrange(self._order, after, "+inf", byscore=True))
        rows: list[bytes | None] = []
        for start in range(0, len(ids), READ_AT_ONCE):
            read = partial(self._rows, ids=ids[start : start + READ_AT_ONCE])
            rows += await self.redis.call(read)
        return last, [Item(**json.loads(row)) for row in rows if row is not None]

    async def _rows(self, redis: Redis, ids: Sequence[Any]) -> list[Any]:
        return await redis.hmget(self._items, ids)

    async def put(self, items: Sequence[Item]) -> int:
        return await self.redis.call(lambda redis: self._put(redis, items))

    async def _put(self, redis: Redis, items: Sequence[Item]) -> int:
        change = 0

        async def write(pipe: Pipeline) -> None:  # again where another replica has written meanwhile
            nonlocal change
            change = _next(int(await pipe.get(self._last) or 0))
            known = await pipe.hmget(self._items, [item.item_id for item in items])
            _check_room(int(await pipe.hlen(self._items)) + known.count(None))
            pipe.multi()
            pipe.set(self._last, change)
            pipe.hset(self._items, mapping={item.item_id: _text(item) for item in items})
            pipe.zadd(self._order, {item.item_id: change for item in items})

        await redis.transaction(write, self._last)
        return change
