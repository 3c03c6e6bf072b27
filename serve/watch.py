"""Who watches the requests: each one is counted and, if so wished, told in a line of JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvrec_core.errors import ResourceError, StateUnavailable
from serve.metrics import Metrics, page
from serve.snapshots import Snapshots

KEEP_EVERY_S = 5.0  # a replica's metrics, for the others
GONE = 499  # in place of a status, where the client did not wait for the answer
ANSWER = re.compile(  # how the JSON of an answer begins: see recommend_values and score_values
    rb'\{"model_version":"([^"]*)"(?:,"rung":"(\w+)","unknown_items":(\d+)(,"degraded":true)?)?'
)
ERROR = re.compile(rb'\{"error":\{"code":"(\w+)"')
ODD = re.compile(r"[^\w.:/+=-]", re.ASCII)


class RequestLog:
    """Lines of JSON at the end of a file that others may move away. No ids of users or items, and no text.

    Raises ResourceError where it cannot be written.
    """

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"cannot write the log of requests to {path}: {error}") from None

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"))
        self._file.handle(logging.LogRecord("requests", logging.INFO, "", 0, text, None, None))


class Watch:
    """The metrics of a replica and of its neighbours, and the log of requests, None for none."""

    def __init__(self, metrics: Metrics, snapshots: Snapshots | None = None, log: RequestLog | None = None):
        self.metrics = metrics
        self._snapshots = snapshots
        self._log = log

    async def page(self) -> bytes:
        """For Prometheus: the metrics of all replicas; of this one alone while the others cannot be read."""
        others = []
        if self._snapshots is not None:
            with suppress(StateUnavailable):
                others = await self._snapshots.others(self.metrics.replica)
        return await asyncio.to_thread(page, [self.metrics.values(), *others])  # 1 ms a replica

    @asynccontextmanager
    async def running(self, _: Any) -> AsyncIterator[None]:
        """While the service runs, its metrics are kept where its neighbours find them."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            task.cancel()

    async def _keep(self) -> None:
        while self._snapshots is not None:
            with suppress(StateUnavailable):
                await self._snapshots.keep(self.metrics.replica, self.metrics.values())
            await asyncio.sleep(KEEP_EVERY_S)

    def tell(self, scope: Scope, status: int, answer: bytes, seconds: float) -> None:
        """A request has ended. answer: the beginning of its body, empty where there is none"""
        route = getattr(scope.get("route"), "path_format", "none")
        metrics, code = self.metrics, "ok" if status < 400 else "gone" if status == GONE else "internal"
        version = rung = unknown = degraded = None
        if found := ERROR.match(answer):
            code = found[1].decode()
        elif found := ANSWER.match(answer):
            version, rung, unknown, degraded = (part if part is None else part.decode() for part in found.groups())
        metrics.labelled(metrics.requests, route, status, code).inc()
        metrics.labelled(metrics.request_seconds, route, version or "").observe(seconds)
        if rung is not None:
            metrics.labelled(metrics.answers, route, rung, version).inc()
            if unknown != "0":
                metrics.unknown_items.inc(int(unknown or 0))
            if degraded is not None:
                metrics.degraded.inc()
        if self._log is not None:
            line = {
                "time": round(time.time(), 3),
                "request_id": request_id(scope),
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 2),
                "code": code,
                "model_version": version,
                "rung": rung,
                "k": scope.get("k"),
                "unknown_items": None if unknown is None else int(unknown),
                "degraded": degraded is not None,
            }
            self._log.write({name: value for name, value in line.items() if value is not None})


class Watching:
    """A plain ASGI middleware that tells a Watch of each request under /v1/."""

    def __init__(self, app: ASGIApp, watch: Watch):
        self.app = app
        self.watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        status, answer, began = GONE, b"", time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status, answer
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not answer:
                answer = message.get("body", b"")
            await send(message)

        in_flight = self.watch.metrics.in_flight
        in_flight.inc()
        try:
            await self.app(scope, receive, watched_send)
        except Exception:  # what nobody foresaw: the layer outside of this one answers 500
            status = 500
            raise
        finally:
            in_flight.dec()
            self.watch.tell(scope, status, answer, time.perf_counter() - began)


def request_id(scope: Scope) -> str:
    """The X-Request-ID of the client, or the one that Ray Serve has given, which also puts it into the answer; what may
    not stand in a log becomes "_"."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return ODD.sub("_", given[:64]) or str(uuid.uuid4())
