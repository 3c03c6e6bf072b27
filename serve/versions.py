"""The versions that a replica answers with: one, or several side by side, each for its share of the users."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from cachetools import LRUCache
from pyarrow import ArrowException
from pyarrow.fs import FileType

from mvrec_core import places
from mvrec_core.errors import CheckpointError, MVRecError, RequestError, first_line
from mvrec_core.recommender import Recommender
from mvrec_core.releases import is_kept, local
from mvrec_core.requests import Request, digest
from mvrec_core.rules import Rules
from serve import live_file
from serve.alias import Alias, Release
from serve.current import Current
from serve.items import ItemStore
from serve.last_known import is_known, last_known
from serve.live_file import LiveFile
from serve.settings import checkpoint_config
from serve.trial import try_out

RECORDED = 32  # requests that a new version is tried out on


class Version(NamedTuple):
    release: Release
    current: Current


class Pending(NamedTuple):
    """A version that is to be live and is not: it is being loaded, or was refused, and then `reason` says why."""

    release: Release
    reason: str | None = None


def open_served(served: str, follows: bool) -> LiveFile[Alias]:
    """What an alias file says; of a checkpoint, that it alone is live. served: a path, or a URI of an object store, and
    whether it is an alias.

    Raises ConfigError or CheckpointError.
    """
    return LiveFile(served, last_known if follows else _alone, _report)


def is_alias(served: str) -> bool:
    """Raises CheckpointError where there is nothing."""
    try:
        kind = places.kind(served)
    except (OSError, ArrowException) as error:
        if isinstance(error, OSError) and (is_known(served) or is_kept(served)):
            return is_known(served)
        raise CheckpointError(f"{served}: cannot be read: {first_line(error)}") from None
    if kind == FileType.NotFound:
        raise CheckpointError(f"{served}: no such checkpoint directory or alias file")
    return kind == FileType.File


def _alone(checkpoint: str) -> Alias:
    directory = local(checkpoint)
    name = checkpoint_config(directory).name
    try:
        version = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["model_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{checkpoint}/manifest.json: damaged: expected JSON with 'model_version'") from None
    return Alias(name=name, live=(Release(checkpoint=checkpoint, model_version=version, share=1, since=time.time()),))


def _report(error: Exception) -> None:
    logging.getLogger("ray.serve").error("what is served stays as it was: %s", error)


class Versions:
    """Follows an alias. To be used from one event loop.

    What is new is loaded aside, in a thread of its own, brought up to the items and rules of the moment, and tried out
    on requests that were answered before; then one reference is swapped. Where any version does not pass, all stays as
    it was. Raises the error of what is live where neither that nor anything before it can be served.
    """

    def __init__(self, served: LiveFile[Alias], store: ItemStore, rules: LiveFile[Rules] | None):
        self._served = served
        self._store = store
        self._rules = rules
        self._followed = served.value
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="versions")
        self._recorded: LRUCache[bytes, Request] = LRUCache(RECORDED)
        self._pending: tuple[Pending, ...] = ()
        self._live = self._first(served.value)

    @property
    def main(self) -> Current:
        """Of the version of the most users."""
        return max(self._live, key=lambda version: version.release.share).current

    def of(self, request: Request) -> Current:
        """The version that a request names, else that of its user, which stays the same while the shares do. Raises
        RequestError."""
        live = self._live
        if request.model_version is not None:
            for version in live:
                if version.release.model_version == request.model_version:
                    return version.current
            names = ", ".join(version.release.model_version for version in live)
            raise RequestError(
                f"model_version: expected one of {names}, found '{request.model_version}'", "model_version", 404
            )
        if len(live) == 1 or (request.user_id is None and not request.events):  # it is about nobody
            return self.main
        return live[chosen([version.release.share for version in live], request)].current

    def record(self, request: Request) -> None:
        """Keeps of a request that has been answered who asked for how many items."""
        who = (request.user_id, request.events, request.k)
        self._recorded[digest(*who)] = Request(request.user_id, request.events, request.k)

    def values(self) -> list[dict[str, Any]]:
        """Those that answer, and those that are to but do not, as the `versions` of a VersionsAnswer."""
        live = [
            _values(version.release, "live", None, version.current.recommender.excludes_seen(Request()))
            for version in self._live
        ]
        pending = [
            _values(one.release, "refused" if one.reason else "loading", one.reason, None) for one in self._pending
        ]
        return live + pending

    async def follow(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(live_file.LOOK_EVERY_S / 2)
            await self.look()

    async def look(self) -> None:
        """Makes live what the alias says, where that has changed."""
        loop = asyncio.get_running_loop()
        alias = await loop.run_in_executor(self._thread, self._served.read)
        if alias is self._followed:
            return
        self._followed = alias
        here = {version.release.model_version: version.current for version in self._live}
        new = [release for release in alias.live if release.model_version not in here]
        self._pending = tuple(Pending(release) for release in new)
        for release in new:
            try:
                here[release.model_version] = await self._bring_up(release)
            except Exception as error:  # whatever it is, the old version goes on
                self._refuse(release, error)
                return
        self._live = tuple(Version(release, here[release.model_version]) for release in alias.live)
        self._pending = ()

    async def _bring_up(self, release: Release) -> Current:
        loop = asyncio.get_running_loop()
        current = await loop.run_in_executor(self._thread, self._load, release)
        recommender, old = await current.follow(), self.main.recommender
        await loop.run_in_executor(self._thread, try_out, recommender, list(self._recorded.values()), old)
        return current

    def _first(self, alias: Alias) -> tuple[Version, ...]:
        """What is live, or the newest before it that can be served, which the other replicas have stayed with."""
        errors: list[MVRecError] = []
        for live in (alias.live, *reversed(alias.before)):
            versions: list[Version] = []
            try:
                for release in live:
                    versions.append(Version(release, self._load(release)))
                return tuple(versions)
            except MVRecError as error:
                errors.append(error)
                if live is alias.live:
                    self._refuse(release, error)
        raise errors[0]

    def _refuse(self, release: Release, error: Exception) -> None:
        self._pending = (Pending(release, str(error) or type(error).__name__),)
        _report(error)

    def _load(self, release: Release) -> Current:
        recommender = Recommender.load(release.checkpoint, device="cpu")
        if recommender.model_version != release.model_version:
            raise CheckpointError(
                f"{release.checkpoint}: expected version {release.model_version}, as it was published, "
                f"found {recommender.model_version}"
            )
        try_out(recommender)
        return Current(recommender, self._store, self._rules)


def chosen(shares: Sequence[float], request: Request) -> int:
    """A place in `shares`, by a hash of the user; of somebody without an id, of the events."""
    who = request.events if request.user_id is None else request.user_id
    point = int.from_bytes(digest("share", who)[:8]) / 2**64
    for place, share in enumerate(shares):
        point -= share
        if point < 0:
            return place
    return len(shares) - 1  # shares may sum to a little less than 1


def _values(release: Release, state: str, reason: str | None, exclude_seen: bool | None) -> dict[str, Any]:
    values = {"model_version": release.model_version, "share": release.share, "since": release.since, "state": state}
    return values | {"reason": reason, "exclude_seen": exclude_seen}
