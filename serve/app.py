"""The Ray Serve deployment: one class that batches requests, holds a Recommender and carries the routes of api.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from mvrec_core.config import ServeConfig
from mvrec_core.errors import RequestError, StateUnavailable
from mvrec_core.recommender import Recommended, Recommender
from mvrec_core.requests import Candidate, Request, digest
from serve.api import create_api
from serve.batching import Batcher
from serve.cache import Cache
from serve.redis_client import RedisClient
from serve.schema import as_json, events_values, history_values, recommend_values, score_values
from serve.sessions import LiveEvent, live_events, open_sessions
from serve.settings import serve_settings

APP_NAME = "mvrec"
ADMITTED_BATCHES = 16  # what a replica takes at a time, in full batches; beyond it answers 503
SPARE_REQUESTS = 64  # pages and health checks, which are not counted above, and the refusals themselves
TIMEOUT_S = 10.0  # of an answer; Serve's own, which answers in plain text, is longer and only a net

T = TypeVar("T")


class BuildArgs(BaseModel):
    """Arguments of `build`; what is not given is taken from the checkpoint."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    threads: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    max_batch_size: int | None = None
    batch_wait_s: float | None = None
    redis_url: str | None = None
    state_dir: str | None = None
    live_events: int | None = None
    live_users: int | None = None
    live_ttl_s: float | None = None
    cache_mb: float | None = None
    cache_ttl_s: float | None = None


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config with `import_path: serve.app:build`; `args` are those of BuildArgs."""
    given = BuildArgs.model_validate(args)
    return application(given.checkpoint, serve_settings(given.checkpoint, given.model_dump(exclude={"checkpoint"})))


def application(checkpoint: str, settings: ServeConfig) -> serve.Application:
    """The application that serves `checkpoint` with `settings`."""
    admitted = ADMITTED_BATCHES * settings.max_batch_size
    state = Path(settings.state_dir or Path(checkpoint).resolve().parent / "state").resolve()
    deployment = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": settings.threads},
        max_ongoing_requests=admitted + SPARE_REQUESTS,
        max_queued_requests=admitted,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch_size,
        },
        max_constructor_retry_count=2,  # a damaged checkpoint stays damaged
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=TIMEOUT_S,
    )
    return deployment(serve.ingress()(Replica)).bind(checkpoint, {**settings.model_dump(), "state_dir": str(state)})


class Replica:
    """A Recommender behind the routes, with the live events of users, and answers that are remembered.

    Torch runs in one thread of its own, so the event loop never waits for it.
    """

    def __init__(self, checkpoint: str, settings: dict[str, Any]):
        self.settings = ServeConfig.model_validate(settings)
        torch.set_num_threads(self.settings.threads)  # Ray has set OMP_NUM_THREADS by its own rule
        self.recommender = Recommender.load(checkpoint, device="cpu")
        self.model_version = self.recommender.model_version
        self.n_items = self.recommender.n_items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
        self._batcher = Batcher(
            self.recommender.recommend, self._thread, self.settings.max_batch_size, self.settings.batch_wait_s
        )
        run = self.recommender.config.name
        redis = RedisClient(self.settings.redis_url) if self.settings.redis_url else None
        self._sessions = open_sessions(self.settings, run, redis)
        cached = int(self.settings.cache_mb * 2**20)
        self._cache = Cache(cached, self.settings.cache_ttl_s, redis if cached else None, run)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self, ADMITTED_BATCHES * self.settings.max_batch_size, TIMEOUT_S)

    async def recommend(self, request: Request) -> bytes:
        row, degraded = await self._row(request.user_id)

        async def answer() -> bytes:
            found = await self._batcher.answer(replace(request, live=live_events(row)))
            return as_json(recommend_values(self.model_version, found, degraded))

        return await self._cache.get(digest(self.model_version, request, row, degraded), answer)

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> bytes:
        row, degraded = await self._row(request.user_id)
        scored = await self._in_thread(self.recommender.score, replace(request, live=live_events(row)), candidates)
        return as_json(score_values(self.model_version, *scored, degraded))

    async def similar(self, item_id: str, k: int) -> list[Recommended]:
        return await self._in_thread(self.recommender.similar, item_id, k)

    async def history(self, user_id: str, limit: int) -> bytes:
        row, degraded = await self._row(user_id)
        try:
            events = await self._in_thread(self.recommender.history, user_id, limit, live_events(row))
        except RequestError:  # nobody the model knows, but perhaps one with live events
            if not degraded:
                raise
            events = []
        return as_json(history_values(user_id, events, degraded))

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> bytes:
        unknown = await self._in_thread(self.recommender.unknown_items, [event.event() for event in events])
        return as_json(events_values(user_id, unknown, await self._sessions.append(user_id, events)))

    async def users(self, prefix: str, limit: int) -> list[str]:
        return await self._in_thread(self.recommender.users, prefix, limit)

    async def _row(self, user_id: str | None) -> tuple[str, bool]:
        """A user's live events, and whether they could not be read: an answer without them is better than none."""
        try:
            return "" if user_id is None else await self._sessions.read(user_id), False
        except StateUnavailable:
            return "", True

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
