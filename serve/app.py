"""The Ray Serve deployment: one class that batches requests, holds a Recommender and carries the routes of api.py."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException

from mvrec_core.answers import Answer
from mvrec_core.config import ServeConfig
from mvrec_core.errors import ConfigError, Overloaded, RequestError, ResourceError, StateUnavailable
from mvrec_core.places import is_uri
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Candidate, Item, Request, digest
from serve.answers import (
    as_json,
    events_values,
    forgotten_values,
    history_values,
    items_values,
    recommend_values,
    score_values,
    similar_values,
)
from serve.api import create_api
from serve.batching import Batcher
from serve.cache import Cache
from serve.items import open_items
from serve.keys import read_keys
from serve.last_known import last_known
from serve.metrics import Metrics
from serve.redis_client import RedisClient
from serve.rules import AuditLog, rules_file
from serve.sessions import LiveEvent, live_events, newest_event, open_sessions
from serve.settings import serve_settings
from serve.snapshots import open_snapshots
from serve.threads import TorchThread
from serve.versions import Versions, is_alias, open_served
from serve.watch import RequestLog, Watch

APP_NAME = "mvrec"
ADMITTED_BATCHES = 16  # what a replica takes at a time, in full batches; beyond it answers 503
LOOK_BACK_S = 10.0  # over which requests are averaged, unless replicas should come sooner
SPARE_REQUESTS = 64  # pages and health checks, which are not counted above, and the refusals themselves
CHECK_EVERY_S = 3.0  # a replica's health; Serve replaces it after three failures, so within 30 s
CHECK_WITHIN_S = 5.0  # or its event loop is taken to stand still
STALLED_S = 12.0  # for so long torch is at one batch only where something is wrong
RARE = 0.1  # share of the answers that are remembered: below it, it does not pay to look whether one is
SAMPLE_EVERY_S = 0.2  # one answer, for the metrics of views and drift

T = TypeVar("T")


class BuildArgs(BaseModel):
    """Arguments of `build`; what is not given is taken from the checkpoint."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = None
    alias: str | None = None  # instead of a checkpoint: a file that says which are live
    threads: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    upscale_s: float | None = None
    downscale_s: float | None = None
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
    if (given.checkpoint is None) == (given.alias is None):
        raise ConfigError("expected either 'checkpoint' or 'alias'")
    checkpoint = given.checkpoint or last_known(str(given.alias)).main.checkpoint
    settings = serve_settings(checkpoint, given.model_dump(exclude={"checkpoint", "alias"}))
    return application(str(given.checkpoint or given.alias), settings)


def application(served: str, settings: ServeConfig) -> serve.Application:
    """The application that serves a checkpoint, or what an alias file says, with `settings`. served: a path, or a URI
    of an object store; then what is not in Redis is kept in ./state unless settings.state_dir says where."""
    admitted = ADMITTED_BATCHES * settings.max_batch_size
    beside = Path()
    if not is_uri(served):
        path = Path(served).absolute()
        path = path.resolve() if path.is_dir() else path  # an alias may be a link that moves
        served, beside = str(path), path.parent
    state = Path(settings.state_dir or beside / "state").resolve()
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
            "upscale_delay_s": settings.upscale_s,
            "downscale_delay_s": settings.downscale_s,
            "look_back_period_s": max(1.0, min(settings.upscale_s, LOOK_BACK_S)),
            "metrics_interval_s": max(0.2, min(settings.upscale_s, LOOK_BACK_S) / 5),
        },
        max_constructor_retry_count=2,  # a damaged checkpoint stays damaged
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.deadline_s,
        health_check_period_s=CHECK_EVERY_S,
        health_check_timeout_s=CHECK_WITHIN_S,
        logging_config={"enable_access_log": False},  # it names users, and takes a tenth of a quick answer
    )
    files = {"state_dir": str(state), "rules": rules, "audit": audit, "request_log": log, "api_keys": keys}
    return deployment(serve.ingress()(Replica)).bind(served, settings.model_dump() | files)


class Replica:
    """The Recommenders of the moment behind the routes, with the live events of users, and answers that are remembered.

    Each answer is made by one Recommender: of one version, the newest as it begins. Torch runs in one thread of its
    own, so the event loop never waits for it, and in another one for what the answers of others should not wait for:
    explanations, texts of new candidates, samples for the metrics.
    """

    def __init__(self, served: str, settings: dict[str, Any]):
        self.settings = ServeConfig.model_validate(settings)
        self.keys: Sequence[str] = read_keys(self.settings.api_keys)
        torch.set_num_threads(self.settings.threads)  # Ray has set OMP_NUM_THREADS by its own rule
        self._follows = is_alias(served)
        alias = open_served(served, self._follows)
        self._metrics = Metrics(_replica_name())
        self._sampled = 0.0
        self._thread = TorchThread("torch")
        self._cold = TorchThread("cold")
        limits = (self.settings.max_batch_size, self.settings.batch_wait_s, self.settings.deadline_s)
        self._batcher = Batcher(self._thread, *limits, heard=self._metrics.batched)
        self._explained = Batcher(self._cold, 1, 0.0, self.settings.deadline_s)
        run = alias.value.name
        redis = RedisClient(self.settings.redis_url) if self.settings.redis_url else None
        rules, audit = self.settings.rules, self.settings.audit
        items = open_items(self.settings, run, redis)
        self._versions = Versions(alias, items, rules_file(Path(rules)) if rules else None)
        self._audit = AuditLog(Path(audit)) if rules and audit else None
        self._sessions = open_sessions(self.settings, run, redis)
        cached = int(self.settings.cache_mb * 2**20)
        self._cache = Cache(cached, self.settings.cache_ttl_s, redis if cached else None, run, self._metrics.looked_up)
        log = self.settings.request_log
        self.watch = Watch(
            self._metrics, open_snapshots(self.settings, run, redis), RequestLog(Path(log)) if log else None
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(
            self, ADMITTED_BATCHES * self.settings.max_batch_size, self.settings.deadline_s, self._running
        )

    @asynccontextmanager
    async def _running(self, api: FastAPI) -> AsyncIterator[None]:
        """While the application runs."""
        following = asyncio.create_task(self._versions.follow()) if self._follows else None
        async with self.watch.running(api):
            yield
        if following is not None:
            following.cancel()

    async def check_health(self) -> None:
        """Ray Serve asks, and replaces a replica that fails three times or does not answer. Raises ResourceError."""
        if self._thread.busy_s > STALLED_S:
            raise ResourceError(f"the model has been at one batch for {self._thread.busy_s:.0f} s")

    @property
    def model_version(self) -> str:
        return self._versions.main.recommender.model_version

    @property
    def n_items(self) -> int:
        return self._versions.main.recommender.n_items

    def versions(self) -> list[dict[str, Any]]:
        return self._versions.values()

    def overload(self) -> Overloaded | None:
        """Why a request for recommendations need not even be read: its answer would come too late, and it hardly ever
        is one that is remembered."""
        return self._batcher.overload() if self._cache.useful < RARE else None

    async def recommend(self, request: Request) -> bytes:
        with self._metrics.state.time():
            recommender = await self._versions.of(request).catch_up()
            row, degraded = await self._row(request.user_id)
            now = _moment(recommender, request, row)

        async def answer() -> bytes:
            asked = replace(request, now=now, live=live_events(row))
            batcher = self._explained if asked.explain else self._batcher
            found = await batcher.answer(recommender.recommend, asked)
            self._sample(recommender, asked, found)
            if self._audit is not None:
                self._audit.write(found, recommender.model_version)
            self._versions.record(request)
            return as_json(recommend_values(recommender.model_version, found, degraded))

        key = digest(recommender.version, vars(request) | {"now": now}, row, degraded)
        return await self._cache.get(key, answer)

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> bytes:
        recommender = await self._versions.of(request).catch_up()
        row, degraded = await self._row(request.user_id)
        new = any(candidate.features is not None for candidate in candidates)
        asked = replace(request, now=_moment(recommender, request, row), live=live_events(row))
        scored = await self._in_thread(recommender.score, asked, candidates, thread=self._cold if new else self._thread)
        return as_json(score_values(recommender.model_version, *scored, degraded))

    async def similar(self, item_id: str, request: Request) -> bytes:
        recommender = await self._versions.of(request).catch_up()
        items = await self._in_thread(recommender.similar, item_id, request)
        return as_json(similar_values(recommender.model_version, item_id, items))

    async def put_items(self, items: Sequence[Item]) -> dict[str, Any]:
        return items_values(await self._versions.main.put(items))

    async def remove_items(self, item_ids: Sequence[str]) -> dict[str, Any]:
        current = self._versions.main
        known = (await current.catch_up()).knows(item_ids)
        if not all(known):
            strange = next(item_id for item_id, there in zip(item_ids, known, strict=True) if not there)
            raise RequestError(f"item_id: '{strange}' is not in the catalogue", "item_id", 404)
        return items_values(await current.put([Item(item_id) for item_id in item_ids]))

    async def history(self, user_id: str, limit: int) -> bytes:
        recommender = await self._versions.of(Request(user_id)).catch_up()
        row, degraded = await self._row(user_id)
        try:
            events = await self._in_thread(recommender.history, user_id, limit, live_events(row))
        except RequestError:  # nobody the model knows, but perhaps one with live events
            if not degraded:
                raise
            events = []
        return as_json(history_values(user_id, events, degraded))

    async def append(self, user_id: str, events: Sequence[LiveEvent]) -> bytes:
        recommender = await self._versions.of(Request(user_id)).catch_up()
        unknown = await self._in_thread(recommender.unknown_items, [event.event() for event in events])
        return as_json(events_values(user_id, unknown, await self._sessions.append(user_id, events)))

    async def forget(self, user_id: str, event_ids: Sequence[str] | None) -> bytes:
        return as_json(forgotten_values(user_id, await self._sessions.forget(user_id, event_ids)))

    async def users(self, prefix: str, limit: int) -> list[str]:
        return await self._in_thread(self._versions.main.recommender.users, prefix, limit)

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
        if answer.items and answer.rung != "popularity" and as_the_reference(recommender, request):
            best = max(item.score for item in answer.items)
            self._metrics.scored(version, reference, best, request.now is not None)
        self._metrics.items.labels(version).set(recommender.n_items)

    async def _in_thread(self, function: Callable[..., T], *args: Any, thread: Executor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, function, *args)


def _moment(recommender: Recommender, request: Request, row: str) -> float | None:
    """When a request is made, to the model; `row` are the live events of its user."""
    return recommender.moment(replace(request, live=newest_event(row)) if row else request, time.time())


def as_the_reference(recommender: Recommender, request: Request) -> bool:
    """Whether the best item of its answer may be any that evaluation ranks, as with the checkpoint's reference."""
    seen_too = recommender.config.evaluate.exclude_seen != recommender.excludes_seen(request)
    return not seen_too and request.allow is None and not (request.deny or request.where)


def _replica_name() -> str:
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:  # a test
        return uuid.uuid4().hex[:8]
