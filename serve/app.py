"""The Ray Serve deployment: one class that batches requests, holds a Recommender and carries the routes of api.py."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException

from mvrec_core.config import ServeConfig
from mvrec_core.errors import RequestError, ResourceError, StateUnavailable
from mvrec_core.recommender import Answer, Recommended, Recommender
from mvrec_core.requests import Candidate, Item, Request, digest
from serve.api import create_api
from serve.batching import Batcher
from serve.cache import Cache
from serve.current import Current
from serve.items import open_items
from serve.keys import read_keys
from serve.metrics import Metrics
from serve.redis_client import RedisClient
from serve.rules import AuditLog, RulesFile
from serve.schema import as_json, events_values, history_values, items_values, recommend_values, score_values
from serve.sessions import LiveEvent, live_events, open_sessions
from serve.settings import serve_settings
from serve.snapshots import open_snapshots
from serve.threads import TorchThread
from serve.watch import RequestLog, Watch

APP_NAME = "mvrec"
ADMITTED_BATCHES = 16  # what a replica takes at a time, in full batches; beyond it answers 503
SPARE_REQUESTS = 64  # pages and health checks, which are not counted above, and the refusals themselves
CHECK_EVERY_S = 3.0  # a replica's health; Serve replaces it after three failures, so within 30 s
CHECK_WITHIN_S = 5.0  # or its event loop is taken to stand still
STALLED_S = 12.0  # for so long torch is at one batch only where something is wrong
SAMPLE_EVERY_S = 0.2  # one answer, for the metrics of views and drift

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
    deadline_s: float | None = None
    redis_url: str | None = None
    state_dir: str | None = None
    live_events: int | None = None
    live_users: int | None = None
    live_ttl_s: float | None = None
    cache_mb: float | None = None
    cache_ttl_s: float | None = None
    rules: str | None = None
    audit: str | None = None
    request_log: str | None = None
    api_keys: str | None = None


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config with `import_path: serve.app:build`; `args` are those of BuildArgs."""
    given = BuildArgs.model_validate(args)
    return application(given.checkpoint, serve_settings(given.checkpoint, given.model_dump(exclude={"checkpoint"})))


def application(checkpoint: str, settings: ServeConfig) -> serve.Application:
    """The application that serves `checkpoint` with `settings`."""
    admitted = ADMITTED_BATCHES * settings.max_batch_size
    state = Path(settings.state_dir or Path(checkpoint).resolve().parent / "state").resolve()
    rules = None if settings.rules is None else str(Path(settings.rules).resolve())
    audit = str(Path(settings.audit or state / "withheld.jsonl").resolve())
    log = None if settings.request_log is None else str(Path(settings.request_log).resolve())
    keys = None if settings.api_keys is None else str(Path(settings.api_keys).resolve())
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
        graceful_shutdown_timeout_s=settings.deadline_s,
        health_check_period_s=CHECK_EVERY_S,
        health_check_timeout_s=CHECK_WITHIN_S,
    )
    files = {"state_dir": str(state), "rules": rules, "audit": audit, "request_log": log, "api_keys": keys}
    return deployment(serve.ingress()(Replica)).bind(checkpoint, settings.model_dump() | files)


class Replica:
    """The Recommender of the moment behind the routes, with the live events of users, and answers that are remembered.

    Each answer is made by one Recommender, the newest as it begins. Torch runs in one thread of its own, so the event
    loop never waits for it, and in another one for what the answers of others should not wait for: explanations, texts
    of new candidates, samples for the metrics.
    """

    def __init__(self, checkpoint: str, settings: dict[str, Any]):
        self.settings = ServeConfig.model_validate(settings)
        self.keys: Sequence[str] = read_keys(self.settings.api_keys)
        torch.set_num_threads(self.settings.threads)  # Ray has set OMP_NUM_THREADS by its own rule
        recommender = Recommender.load(checkpoint, device="cpu")
        self.model_version = recommender.model_version
        self._metrics = Metrics(_replica_name())
        self._sampled = 0.0
        self._thread = TorchThread("torch")
        self._cold = TorchThread("cold")
        limits = (self.settings.max_batch_size, self.settings.batch_wait_s, self.settings.deadline_s)
        self._batcher = Batcher(self._thread, *limits, heard=self._metrics.batched)
        self._explained = Batcher(self._cold, 1, 0.0, self.settings.deadline_s)
        run = recommender.config.name
        redis = RedisClient(self.settings.redis_url) if self.settings.redis_url else None
        rules, audit = self.settings.rules, self.settings.audit
        items = open_items(self.settings, run, redis)
        self._current = Current(recommender, items, RulesFile(Path(rules)) if rules else None)
        self._audit = AuditLog(Path(audit)) if rules and audit else None
        self._sessions = open_sessions(self.settings, run, redis)
        cached = int(self.settings.cache_mb * 2**20)
        self._cache = Cache(cached, self.settings.cache_ttl_s, redis if cached else None, run, self._metrics.looked_up)
        log = self.settings.request_log
        self.watch = Watch(
            self._metrics, open_snapshots(self.settings, run, redis), RequestLog(Path(log)) if log else None
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self, ADMITTED_BATCHES * self.settings.max_batch_size, self.settings.deadline_s)

    async def check_health(self) -> None:
        """Ray Serve asks, and replaces a replica that fails three times or does not answer. Raises ResourceError."""
        if self._thread.busy_s > STALLED_S:
            raise ResourceError(f"the model has been at one batch for {self._thread.busy_s:.0f} s")

    @property
    def n_items(self) -> int:
        return self._current.recommender.n_items

    async def recommend(self, request: Request) -> bytes:
        with self._metrics.state.time():
            recommender = await self._current.catch_up()
            row, degraded = await self._row(request.user_id)

        async def answer() -> bytes:
            asked = replace(request, live=live_events(row))
            batcher = self._explained if asked.explain else self._batcher
            found = await batcher.answer(recommender.recommend, asked)
            self._sample(recommender, asked, found)
            if self._audit is not None:
                self._audit.write(found, self.model_version)
            return as_json(recommend_values(self.model_version, found, degraded))

        return await self._cache.get(digest(recommender.version, request, row, degraded), answer)

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> bytes:
        recommender = await self._current.catch_up()
        row, degraded = await self._row(request.user_id)
        new = any(candidate.features is not None for candidate in candidates)
        asked = replace(request, live=live_events(row))
        scored = await self._in_thread(recommender.score, asked, candidates, thread=self._cold if new else self._thread)
        return as_json(score_values(self.model_version, *scored, degraded))

    async def similar(self, item_id: str, request: Request) -> list[Recommended]:
        recommender = await self._current.catch_up()
        return await self._in_thread(recommender.similar, item_id, request)

    async def put_items(self, items: Sequence[Item]) -> dict[str, Any]:
        return items_values(self.model_version, await self._current.put(items))

    async def remove_items(self, item_ids: Sequence[str]) -> dict[str, Any]:
        known = (await self._current.catch_up()).knows(item_ids)
        if not all(known):
            strange = next(item_id for item_id, there in zip(item_ids, known, strict=True) if not there)
            raise RequestError(f"item_id: '{strange}' is not in the catalogue", "item_id", 404)
        return items_values(self.model_version, await self._current.put([Item(item_id) for item_id in item_ids]))

    async def history(self, user_id: str, limit: int) -> bytes:
        recommender = await self._current.catch_up()
        row, degraded = await self._row(user_id)
        try:
            events = await self._in_thread(recommender.history, user_id, limit, live_events(row))
        except RequestError:  # nobody the model knows, but perhaps one with live events
            if not degraded:
                raise
            events = []
        return as_json(history_values(user_id, events, degraded))

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> bytes:
        recommender = await self._current.catch_up()
        unknown = await self._in_thread(recommender.unknown_items, [event.event() for event in events])
        return as_json(events_values(user_id, unknown, await self._sessions.append(user_id, events)))

    async def users(self, prefix: str, limit: int) -> list[str]:
        return await self._in_thread(self._current.recommender.users, prefix, limit)

    async def _row(self, user_id: str | None) -> tuple[str, bool]:
        """A user's live events, and whether they could not be read: an answer without them is better than none."""
        try:
            return "" if user_id is None else await self._sessions.read(user_id), False
        except StateUnavailable:
            return "", True

    def _sample(self, recommender: Recommender, request: Request, answer: Answer) -> None:
        """Now and then, what an answer says of views and drift."""
        if (now := time.monotonic()) - self._sampled >= SAMPLE_EVERY_S:
            self._sampled = now
            self._cold.submit(self._observe, recommender, request, answer)

    def _observe(self, recommender: Recommender, request: Request, answer: Answer) -> None:
        version, reference = recommender.model_version, recommender.reference
        self._metrics.used(version, reference, recommender.view_use(request))
        if answer.items and answer.rung != "popularity" and as_the_reference(request):
            best = max(item.score for item in answer.items)
            self._metrics.scored(version, reference, best, request.now is not None)
        self._metrics.items.labels(version).set(recommender.n_items)

    async def _in_thread(self, function: Callable[..., T], *args: Any, thread: Executor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, function, *args)


def as_the_reference(request: Request) -> bool:
    """Whether the best item of its answer may be any but those of the history, as with the checkpoint's reference."""
    return request.exclude_seen and request.allow is None and not (request.deny or request.where)


def _replica_name() -> str:
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:  # a test
        return uuid.uuid4().hex[:8]
