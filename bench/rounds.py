"""A while of requests of one kind: how many there were a second, and what each cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

K = 20  # items of a request


class Round(NamedTuple):
    """Requests/s, and the seconds of CPU that whoever answers spent on one: these hardly depend on other work."""

    rate: float
    cpu_s: float


def best(rounds: Sequence[Round]) -> Round:
    return Round(max(one.rate for one in rounds), min(one.cpu_s for one in rounds))
