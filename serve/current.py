"""The Recommender of this moment: the checkpoint's, with the changes of items and rules that all replicas share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from mvrec_core.errors import ConfigError, RequestError, StateUnavailable
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Item
from mvrec_core.rules import Rules
from serve.items import ItemStore, same_store
from serve.live_file import LiveFile
from serve.rules import report

PATIENCE_S = 0.1  # for what other replicas have changed


class Current:
    """Follows a store of items and a file of rules. To be used from one event loop.

    What is new is encoded in a thread of its own and then swapped in by one reference, so that whoever answers from the
    old Recommender is not disturbed. Raises ConfigError where the rules name a view that items do not have.
    """

    def __init__(self, recommender: Recommender, store: ItemStore, rules: LiveFile[Rules] | None):
        self._loaded = recommender
        self._followed = Rules() if rules is None else rules.value
        self.recommender = recommender.with_rules(self._followed)
        self._store = store
        self._rules = rules
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="current")
        self._following: asyncio.Task[Recommender] | None = None
        self._followed_once = False

    async def catch_up(self) -> Recommender:
        """The Recommender with all that any replica was told before. Without the store, with what is here.

        Where texts of new items have to be read, which may take seconds, nobody but the first who ever asks waits
        longer than PATIENCE_S: meanwhile it is one without these items. Removed items go first.
        """
        if self._behind(await self._version()):
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self.follow())
            within_s = PATIENCE_S if self._followed_once else None
            done, _ = await asyncio.wait({self._following}, timeout=within_s)
            for following in done:
                following.result()
        self._followed_once = True
        return self.recommender

    async def follow(self) -> Recommender:
        """The same, and it waits."""
        while self._behind(await self._version()):
            async with self._lock:  # those who come meanwhile wait for the same work
                version = await self._version()
                if self._behind(version):
                    await self._follow(version)
        self._followed_once = True
        return self.recommender

    async def put(self, items: Sequence[Item]) -> Recommender:
        """Adds or changes items, or removes those without features, for all replicas. Raises RequestError naming what
        is wrong, StateUnavailable."""
        await self._run(self.recommender.check_items, [item for item in items if item.features is not None])
        await self._store.put(items)
        return await self.follow()

    async def _version(self) -> int:
        """The store's; while it is away, that of what is here."""
        try:
            return await self._store.version()
        except StateUnavailable:
            return self.recommender.items_version

    def _behind(self, version: int) -> bool:
        return version != self.recommender.items_version or self._wanted is not self._followed

    @property
    def _wanted(self) -> Rules:
        return self._followed if self._rules is None else self._rules.read()

    async def _follow(self, version: int) -> None:
        now = self.recommender
        if not same_store(version, now.items_version):
            now = await self._run(self._loaded.with_rules, self._followed)
        rules = self._wanted
        if rules is not self._followed:
            self._followed = rules
            try:
                now = await self._run(now.with_rules, rules)
            except ConfigError as error:
                report(error)
        with suppress(StateUnavailable):
            last, items = await self._store.since(now.items_version)
            removed = [item for item in items if item.features is None]
            if removed and len(removed) < len(items):
                self.recommender = await self._run(now.with_items, removed, -last)  # no version of a store
            if last != now.items_version:
                now = await self._run(self._with_items, now, items, last)
        self.recommender = now

    def _with_items(self, now: Recommender, items: Sequence[Item], version: int) -> Recommender:
        """With those that this model can read: another one may have taken them in."""
        try:
            return now.with_items(items, version)
        except RequestError:
            return now.with_items([item for item in items if self._readable(item)], version)

    def _readable(self, item: Item) -> bool:
        try:
            self._loaded.check_items([item])
        except RequestError as error:
            logging.getLogger("ray.serve").warning("item %s is left out: %s", item.item_id, error)
            return False
        return True

    async def _run(self, function, *args):  # type: ignore[no-untyped-def]
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
