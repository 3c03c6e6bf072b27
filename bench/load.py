"""Load on a service at a loopback address: raw HTTP/1.1 over connections that stay open, for a process of its own.

A client library takes more of the cores that the service needs than this does; what a client of the service would write
is in the README.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import uvloop

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
ENOUGH = 1500  # connections at most
PATIENCE_S = 60.0  # after which an answer has failed


class Outcome(NamedTuple):
    """due: when it was to be sent, seconds on the clock of time.time(); took: from then on; status: 0 for a connection
    that broke; body: kept where it was asked for."""

    ask: int
    client: int
    due: float
    took: float
    status: int
    body: bytes


@dataclass(frozen=True)
class Load:
    outcomes: list[Outcome]
    seconds: float

    def count(self, status: int = 200) -> int:
        return sum(one.status == status for one in self.outcomes)

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.count() / self.seconds

    def took(self, percent: float) -> float:
        """Seconds within which so many percent of the good answers came."""
        return float(np.percentile([one.took for one in self.outcomes if one.status == 200] or [np.nan], percent))

    @property
    def failures(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.status != 200]


def ask(path: str, body: Any = None) -> bytes:
    """A request as it goes over the wire."""
    text = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(text)}\r\n\r\n".encode() + text


def steady(port: int, asks: Sequence[bytes], clients: int, seconds: float = 1e9, keep: bool = False) -> Load:
    """Each client asks as soon as it has its answer: for some seconds, or without a number until all asks have gone."""
    return uvloop.run(_steady(port, asks, clients, seconds, keep))


def paced(port: int, asks: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Asks that come at random, `rate` a second, whether or not the earlier ones have been answered."""
    return uvloop.run(_paced(port, asks, rate, seconds))


async def _steady(port: int, asks: Sequence[bytes], clients: int, seconds: float, keep: bool) -> Load:
    source = iter(enumerate(asks)) if seconds == 1e9 else itertools.cycle(enumerate(asks))
    outcomes: list[Outcome] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        connection = _Connection(port)
        for place, sent in source:
            due = time.time()
            status, body = await connection.answer(sent)
            outcomes.append(Outcome(place, number, due, time.time() - due, status, body if keep else b""))
            if not status:
                await asyncio.sleep(0.05)
            if time.perf_counter() - began > seconds:
                break
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Load(outcomes, time.perf_counter() - began)


async def _paced(port: int, asks: Sequence[bytes], rate: float, seconds: float) -> Load:
    source, draw = itertools.cycle(enumerate(asks)), random.Random(0)
    free: list[_Connection] = []
    outcomes: list[Outcome] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one(place: int, sent: bytes, due: float) -> None:
        connection = free.pop() if free else _Connection(port)
        status, body = await connection.answer(sent)
        outcomes.append(Outcome(place, 0, due, time.time() - due, status, body if status != 200 else b""))
        free.append(connection)

    began = due = time.time()
    while due < began + seconds:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.time()))
        if len(under_way) < ENOUGH:
            task = asyncio.create_task(one(*next(source), due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    for connection in free:
        connection.close()
    return Load(outcomes, time.time() - began)


class _Connection:
    """Opened at the first request, and again after one that broke."""

    def __init__(self, port: int):
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def answer(self, sent: bytes) -> tuple[int, bytes]:
        """Status and body; (0, b"") where the connection breaks or nothing comes."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._answer(sent)
        except (OSError, EOFError, TimeoutError):
            self.close()
            return 0, b""

    async def _answer(self, sent: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else await reader.read()
        if length is None or b"onnection: close" in head:
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None
