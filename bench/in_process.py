"""The model without a service: what runs in a process that has it loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from participants import BATCH
from rounds import K, Round

from mvrec_core.answers import Answer
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request


class Loaded:
    recommender: Recommender  # of that process


def loaded(directory: Path) -> None:
    torch.set_num_threads(1)
    Loaded.recommender = Recommender.load(directory)


def batches(users: Sequence[str], first: int, seconds: float) -> Round:
    """Of the Recommender alone, no two requests the same."""
    began, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        places = range(first + 10**9 + done, first + 10**9 + done + BATCH)
        Loaded.recommender.recommend([Request(users[place % len(users)], k=K, now=float(place)) for place in places])
        done += BATCH
    return Round(done / (time.perf_counter() - began), (time.process_time() - cpu) / done)


def first_scores(directory: Path, users: Sequence[str]) -> list[float]:
    answers = Recommender.load(directory).recommend([Request(user, k=5) for user in users])
    return [answer.items[0].score for answer in answers if isinstance(answer, Answer)]
