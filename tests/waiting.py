"""Waiting for what takes its time, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
