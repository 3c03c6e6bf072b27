"""What each replica last said of its metrics, shared by all: whichever a scrape reaches can answer for the others."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mvrec_core.config import ServeConfig
from mvrec_core.errors import ResourceError, StateUnavailable
from serve.metrics import Values
from serve.redis_client import RedisClient

KEPT_S = 60.0  # after which a replica that says no more has ended


class Snapshots(Protocol):
    """Both methods raise StateUnavailable."""

    async def keep(self, replica: str, values: Values) -> None: ...

    async def others(self, replica: str) -> list[Values]:
        """Of all replicas but this one, unless they have ended."""
        ...


def open_snapshots(settings: ServeConfig, run: str, redis: RedisClient | None) -> Snapshots:
    """Where live events are kept too. Raises ResourceError where the folder cannot be written."""
    if redis is not None:
        return RedisSnapshots(redis, run)
    return FileSnapshots(Path(settings.state_dir or "state") / "metrics")


def _text(values: Values) -> str:
    return json.dumps([time.time(), values])


def _fresh(text: str | bytes) -> Values | None:
    written, values = json.loads(text)
    return values if time.time() - written < KEPT_S else None


class FileSnapshots:
    """A file a replica, which appears whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot keep metrics in {folder}: {error}; set serve.state_dir") from None

    async def keep(self, replica: str, values: Values) -> None:
        aside = self.folder / f"{replica}.tmp"
        try:
            aside.write_text(_text(values), encoding="utf-8")
            aside.rename(self.folder / f"{replica}.json")
        except OSError as error:
            raise StateUnavailable(f"metrics cannot be written: {error}") from error

    async def others(self, replica: str) -> list[Values]:
        found = []
        for path in sorted(self.folder.glob("*.json")):
            if path.stem == replica:
                continue
            with suppress(OSError, ValueError):  # it has just gone
                values = _fresh(path.read_text(encoding="utf-8"))
                if values is None:
                    path.unlink()
                else:
                    found.append(values)
        return found


class RedisSnapshots:
    """A hash with a field a replica."""

    def __init__(self, redis: RedisClient, run: str):
        self.redis = redis
        self._key = f"mvrec:{run}:metrics"

    async def keep(self, replica: str, values: Values) -> None:
        text = _text(values)

        async def write(redis: Any) -> None:
            await redis.hset(self._key, replica, text)
            await redis.expire(self._key, int(2 * KEPT_S))

        await self.redis.call(write)

    async def others(self, replica: str) -> list[Values]:
        async def read(redis: Any) -> dict[bytes, bytes]:
            return await redis.hgetall(self._key)

        found = []
        for name, text in sorted((await self.redis.call(read)).items()):
            values = _fresh(text)
            if values is None:
                await self._forget(name)
            elif name.decode() != replica:
                found.append(values)
        return found

    async def _forget(self, name: bytes) -> None:
        await self.redis.call(lambda redis: redis.hdel(self._key, name))
