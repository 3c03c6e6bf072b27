"""Batches: who shares one, and under load who leaves, who is refused, who waits."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mvrec_core.answers import Answer
from mvrec_core.errors import Overloaded, RequestError
from mvrec_core.requests import Request
from serve.batching import Batcher
from serve.threads import TorchThread


class Model:
    """Answers when it is let; remembers the k of each batch's requests."""

    def __init__(self, seconds: float = 0.0):
        self.batches: list[list[int]] = []
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.seconds = seconds

    def recommend(self, requests):
        self.batches.append([one.k for one in requests])
        self.busy.set()
        self.go_on.wait(5)
        time.sleep(self.seconds)
        return [Answer("history", [], one.k) for one in requests]


def test_a_request_whose_client_has_gone_costs_the_model_nothing():
    model = Model()

    async def run():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size=8, wait_s=0.0)
            first = asyncio.create_task(batcher.answer(model.recommend, Request(k=1)))
            await asyncio.to_thread(model.busy.wait, 5)
            others = [asyncio.create_task(batcher.answer(model.recommend, Request(k=k))) for k in (2, 3, 4)]
            await asyncio.sleep(0)
            others[1].cancel()
            model.go_on.set()
            return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(run())
    assert model.batches == [[1], [2, 4]]
    assert isinstance(answers[2], asyncio.CancelledError)
    assert [answers[place].unknown_items for place in (0, 1, 3)] == [1, 2, 4]


def test_one_that_is_cancelled_while_the_model_runs_hurts_no_neighbour():
    model = Model()

    async def run():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size=8, wait_s=0.01)
            tasks = [asyncio.create_task(batcher.answer(model.recommend, Request(k=k))) for k in (1, 2, 3)]
            await asyncio.to_thread(model.busy.wait, 5)
            tasks[0].cancel()
            model.go_on.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert model.batches == [[1, 2, 3]] and isinstance(answers[0], asyncio.CancelledError)
    assert [one.unknown_items for one in answers[1:]] == [2, 3]


def test_who_would_wait_beyond_the_deadline_is_refused_at_once():
    model = Model(seconds=0.05)
    model.go_on.set()

    async def run():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size=2, wait_s=0.0, deadline_s=0.25)
            await batcher.answer(model.recommend, Request(k=1))  # now it knows what a batch takes
            assert batcher.overload() is None
            began = time.perf_counter()

            async def one(k: int):
                try:
                    return await batcher.answer(model.recommend, Request(k=k))
                except Overloaded as error:
                    return error, time.perf_counter() - began

            asked = asyncio.gather(*(one(k) for k in range(1, 41)))
            await asyncio.sleep(0)
            assert isinstance(batcher.overload(), Overloaded)
            outcome = await asked
            assert batcher.overload() is None
            return outcome, time.perf_counter() - began

    outcome, seconds = asyncio.run(run())
    refused = [one for one in outcome if isinstance(one, tuple)]
    assert 20 <= len(refused) <= 34 and outcome[:4] == [Answer("history", [], k) for k in range(1, 5)]
    assert all(after < 0.05 for _, after in refused) and all(0.2 < error.retry_after_s < 1 for error, _ in refused)
    assert seconds < 0.6  # none that was taken waited for much longer than the deadline


def test_who_can_no_longer_be_answered_in_time_is_refused_before_it_costs_the_model_anything():
    model = Model(seconds=0.05)

    async def run():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size=8, wait_s=0.0, deadline_s=0.2)
            first = asyncio.create_task(batcher.answer(model.recommend, Request(k=1)))
            await asyncio.to_thread(model.busy.wait, 5)
            late = asyncio.create_task(batcher.answer(model.recommend, Request(k=2)))
            await asyncio.sleep(0.25)
            in_time = asyncio.create_task(batcher.answer(model.recommend, Request(k=3)))
            await asyncio.sleep(0)
            model.go_on.set()
            return await asyncio.gather(first, late, in_time, return_exceptions=True)

    answers = asyncio.run(run())
    assert model.batches == [[1], [3]] and isinstance(answers[1], Overloaded)
    assert [answers[place].unknown_items for place in (0, 2)] == [1, 3]


def test_an_idle_model_answers_at_once_and_a_busy_one_has_full_batches():
    waits: list[float] = []
    sizes: list[int] = []

    async def run():
        model = Model(seconds=0.01)
        model.go_on.set()
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(
                executor, 8, 0.0, heard=lambda waited, _: (waits.append(max(waited)), sizes.append(len(waited)))
            )
            for _ in range(5):  # one at a time
                await batcher.answer(model.recommend, Request())
            alone = len(sizes)

            async def client():
                for _ in range(6):
                    await batcher.answer(model.recommend, Request())

            await asyncio.gather(*(client() for _ in range(16)))
            return alone

    alone = asyncio.run(run())
    assert sizes[:alone] == [1] * 5 and sorted(waits[:alone])[2] < 0.002
    assert sum(sizes[alone:]) == 96 and len(sizes[alone:]) <= 14  # 12 full ones


def test_how_long_a_thread_has_been_at_one_thing():
    thread, go_on = TorchThread("torch"), threading.Event()
    assert thread.busy_s == 0
    blocked = thread.submit(go_on.wait, 5)
    time.sleep(0.05)
    assert 0.03 < thread.busy_s < 5
    go_on.set()
    assert blocked.result(5) is True
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result(5)
    assert thread.busy_s == 0
    thread.shutdown()


def batched(recommend, requests, max_size: int = 8):
    """The outcome of each request when all come at once."""

    async def all_at_once():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size, wait_s=0.01)
            return await asyncio.gather(*(batcher.answer(recommend, one) for one in requests), return_exceptions=True)

    return asyncio.run(all_at_once())


def test_a_batch_keeps_answers_and_errors_apart():
    sizes = []

    def recommend(requests):
        sizes.append(len(requests))
        return [RequestError("no", "k") if one.k == 0 else Answer("history", [], one.k) for one in requests]

    outcome = batched(recommend, [Request(k=k) for k in (1, 2, 0, 4, 5)], max_size=4)
    assert [one.unknown_items for one in outcome if isinstance(one, Answer)] == [1, 2, 4, 5]
    assert isinstance(outcome[2], RequestError)
    assert sizes == [4, 1]


def test_a_batch_that_breaks_is_answered_one_by_one():
    def recommend(requests):
        return [Answer("history", [], 10 // one.k) for one in requests]

    outcome = batched(recommend, [Request(k=k) for k in (1, 0, 2)])
    assert [outcome[0].unknown_items, outcome[2].unknown_items] == [10, 5]
    assert isinstance(outcome[1], ZeroDivisionError)


def test_requests_that_come_while_the_model_is_busy_share_its_next_batch():
    sizes, busy, go_on = [], threading.Event(), threading.Event()

    def recommend(requests):
        sizes.append(len(requests))
        busy.set()
        go_on.wait(5)
        return [Answer("history", [], 0) for _ in requests]

    async def trickle():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(executor, max_size=32, wait_s=0.001)
            first = asyncio.create_task(batcher.answer(recommend, Request()))
            await asyncio.to_thread(busy.wait, 5)
            others = []
            for _ in range(5):
                others.append(asyncio.create_task(batcher.answer(recommend, Request())))
                await asyncio.sleep(0.005)  # longer than wait_s: @serve.batch would make five batches of them
            go_on.set()
            await asyncio.gather(first, *others)

    asyncio.run(trickle())
    assert sizes == [1, 5]


def test_a_batch_is_for_one_state_of_the_catalogue():
    def states(*names):
        def of(name):
            return lambda requests: sizes.append((name, len(requests))) or [Answer(name, [], 0) for _ in requests]

        sizes, known = [], {name: of(name) for name in names}

        async def all_at_once():
            with ThreadPoolExecutor(1) as executor:
                batcher = Batcher(executor, max_size=8, wait_s=0.01)
                return await asyncio.gather(*(batcher.answer(known[name], Request()) for name in names))

        return [answer.rung for answer in asyncio.run(all_at_once())], sizes

    order = ["old", "old", "新", "新", "old"]
    assert states(*order) == (order, [("old", 3), ("新", 2)])
