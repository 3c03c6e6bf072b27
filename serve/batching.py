"""Requests that arrive while the model is busy are answered together by its next step.

Ray Serve's `@serve.batch` closes a batch `batch_wait_timeout_s` after its first request even while an earlier one still
runs, so under load many small batches queue where one big one would do; here a batch is closed when the model is free.
Measured with a model of 10 ms a batch and 0.2 ms a request, 64 clients, 2 cores: 516 requests/s and 152 ms at p99 with
`@serve.batch`, 797 and 100 ms with this.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from mvrec_core.answers import Answer
from mvrec_core.errors import Overloaded, RequestError
from mvrec_core.requests import Request

MARGIN = 0.8  # of the deadline, within which an answer has to be expected: one batch takes longer than another

Recommend = Callable[[Sequence[Request]], Sequence[Answer | RequestError]]


class Waiting(NamedTuple):
    recommend: Recommend
    request: Request
    future: asyncio.Future[Answer]
    since: float  # of time.perf_counter()


class Batcher:
    """Calls Recommends in `executor`, with one batch of at most `max_size` requests at a time.

    A batch is for one Recommend, so that an answer is of the catalogue and the rules that its caller has seen, also
    while they change. A batch that is not full waits `wait_s` seconds for company. To be used from one event loop.

    deadline_s: of an answer, from the request on. Who cannot have it by then is refused: at once where a full batch
    waits already, or else when the batch begins, before it costs the model anything
    heard: is told of each batch how long each of its requests had waited, and how long it took, in seconds
    """

    def __init__(
        self,
        executor: Executor,
        max_size: int,
        wait_s: float,
        deadline_s: float = math.inf,
        heard: Callable[[Sequence[float], float], None] = lambda waits, seconds: None,
    ):
        self.executor = executor
        self.max_size = max_size
        self.wait_s = wait_s
        self.deadline_s = deadline_s
        self._heard = heard
        self._batch_s = 0.0  # what a batch takes of late
        self._began = -math.inf  # the last one
        self._waiting: deque[Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, recommend: Recommend, request: Request) -> Answer:
        """The answer to one request; raises what its own part of the batch came to, never a neighbour's. Raises
        Overloaded where it would come after the deadline."""
        if (error := self.overload()) is not None:
            raise error
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(recommend, request, future, time.perf_counter()))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def overload(self) -> Overloaded | None:
        """What a request that came now would be refused with, if it would be."""
        late = len(self._waiting) >= self.max_size and self.expected_s() > MARGIN * self.deadline_s
        return self._overloaded() if late else None

    def expected_s(self) -> float:
        """When a request that came now would be answered: after the batch under way, and all that wait before it."""
        rest = max(0.0, self._began + self._batch_s - time.perf_counter())
        return rest + (len(self._waiting) // self.max_size + 1) * self._batch_s

    def _overloaded(self) -> Overloaded:
        wait_s = self.expected_s()
        return Overloaded(f"{len(self._waiting)} requests wait, and an answer takes {wait_s:.1f} s; try again", wait_s)

    async def _work(self) -> None:
        while self._waiting:
            if len(self._waiting) < self.max_size and self.wait_s > 0:
                await asyncio.sleep(self.wait_s)
            if batch := self._take():
                await self._run(batch)

    def _take(self) -> list[Waiting]:
        """The oldest requests that somebody still waits for and can have in time, of the first one's Recommend; the
        others stay in order."""
        batch: list[Waiting] = []
        others: list[Waiting] = []
        # half at most, or a single slow batch would have all others refused
        oldest = time.perf_counter() + min(self._batch_s, self.deadline_s / 2) - self.deadline_s
        while self._waiting and len(batch) < self.max_size:
            one = self._waiting.popleft()
            if one.future.done():
                continue
            if one.since < oldest:
                one.future.set_exception(self._overloaded())
            elif batch and one.recommend != batch[0].recommend:
                others.append(one)
            else:
                batch.append(one)
        self._waiting.extendleft(reversed(others))
        return batch

    async def _run(self, batch: Sequence[Waiting]) -> None:
        recommend, requests = batch[0].recommend, [one.request for one in batch]
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        self._began = began
        try:
            results = await loop.run_in_executor(self.executor, recommend_each, recommend, requests)
        except Exception as error:  # the executor itself: nobody may wait for an answer that cannot come
            results = [error] * len(batch)
        seconds = time.perf_counter() - began
        self._batch_s += 0.2 * (seconds - self._batch_s) if self._batch_s else seconds
        self._heard([began - one.since for one in batch], seconds)
        for one, result in zip(batch, results, strict=True):
            if one.future.done():  # its client has gone
                continue
            if isinstance(result, Exception):
                one.future.set_exception(result)
            else:
                one.future.set_result(result)


def recommend_each(recommend: Recommend, requests: Sequence[Request]) -> list[Answer | Exception]:
    """An answer or an error for each request; a batch that fails as a whole is answered one by one."""
    try:
        results: list[Answer | Exception] = list(recommend(requests))
        if len(results) != len(requests):
            raise RuntimeError(f"{len(requests)} requests got {len(results)} answers")
        return results
    except Exception as error:
        logging.getLogger("ray.serve").exception("a batch of %d failed", len(requests))
        if len(requests) == 1:
            return [error]
        return [recommend_each(recommend, [request])[0] for request in requests]
