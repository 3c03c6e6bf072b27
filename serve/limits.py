"""What the service refuses before it looks: too many requests at a time, a body too long, an answer too late.

A plain ASGI middleware, so that a refused request costs next to nothing: under more load than can be answered the
refusals themselves are most of the work, and what they take is taken from the answers. The body of what is not refused
is in scope["body"].
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvrec_core.errors import Overloaded
from serve.answers import JSON, error_values

MAX_BODY = 1_000_000  # bytes
RECOMMEND = "/v1/recommend"


class TooLong(Exception):
    """The body is longer than MAX_BODY."""


class Limits:
    """Passes at most `max_in_flight` requests under /v1/ at a time and answers each within `timeout_s` seconds.

    overload: asked for each request for recommendations, says why it need not be read, or None
    """

    def __init__(self, app: ASGIApp, max_in_flight: int, timeout_s: float, overload: Callable[[], Overloaded | None]):
        self.app = app
        self.max_in_flight = max_in_flight
        self.timeout_s = timeout_s
        self.overload = overload
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if self.in_flight >= self.max_in_flight:
            message = f"{self.in_flight} requests are being answered, which is as many as this service takes; try again"
            await overloaded(Overloaded(message, 1.0))(scope, receive, send)
            return
        if scope["path"] == RECOMMEND and (error := self.overload()) is not None:
            await overloaded(error)(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self.timeout_s):
                scope["body"] = await _read(scope, receive)
                await self.app(scope, receive, watched_send)
        except TooLong:
            message = f"the body is longer than {MAX_BODY} bytes"
            # What is left of the body is not read, so the connection cannot be used again.
            refusal = JSON(error_values("body_too_long", message), 413, {"connection": "close"})
            await refusal(scope, receive, send)
        except TimeoutError:
            if started:
                raise
            message = f"no answer within {self.timeout_s:g} s; try again"
            await JSON(error_values("timeout", message), 503, {"retry-after": "1"})(scope, receive, send)


async def _read(scope: Scope, receive: Receive) -> bytes:
    """The whole body; TooLong at the first sign that it exceeds MAX_BODY."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY:
        raise TooLong
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise TooLong
    return bytes(body)


def overloaded(error: Overloaded) -> Response:
    return JSON(error_values("overloaded", str(error)), 503, {"retry-after": str(math.ceil(error.retry_after_s))})
