"""Who may ask: requests that carry one of some keys. Without keys everybody may."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from mvrec_core.errors import ConfigError
from serve.answers import JSON, error_values

VARIABLE = "MVREC_API_KEYS"  # several with commas between them
SHORTEST = 16  # letters of a key
CLOSED = ("/v1/", "/metrics")  # the rest tells nothing of users: health for load balancers, pages, the interface
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def read_keys(path: str | None) -> list[str]:
    """The keys of a file, one a line, or without one those of the environment; empty lines and those that begin with #
    are left out. Raises ConfigError, which shows neither a key nor what was given as the path: it might be one."""
    if path is None:
        where, lines = VARIABLE, os.environ.get(VARIABLE, "").split(",")
    else:
        where = "the file of serve.api_keys"
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where} cannot be read: {type(error).__name__}") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    for place, key in enumerate(keys, 1):
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{where}: key {place}: expected {SHORTEST} ASCII letters or more, without blanks")
    if path is not None and not keys:
        raise ConfigError(f"{where} holds no key, so nobody could ask")
    return keys


class Keys:
    """A plain ASGI middleware that answers 401 unless one of the keys comes as `Authorization: Bearer` or `X-API-Key`.
    It compares digests, all of them, so that the time says nothing of a key."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]):
        self.app = app
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(CLOSED) or self._known(scope):
            await self.app(scope, receive, send)
            return
        message = "a key is needed: send Authorization: Bearer <key>, or X-API-Key: <key>"
        refusal = JSON(error_values("unauthorized", message), 401, {"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b""))
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def describe(interface: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI of a service that asks for keys: the two ways to send one, and the answer without."""
    interface["components"]["securitySchemes"] = SCHEMES
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for path, operations in interface["paths"].items():
        if path.startswith(CLOSED):
            for operation in operations.values():
                operation["security"] = [{name: []} for name in SCHEMES]
                operation["responses"]["401"] = {"description": "Unauthorized", "content": error}
    return interface
