"""Threads that torch runs in, and since when each has been at what it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class TorchThread(ThreadPoolExecutor):
    """One thread, which does one thing after the other."""

    def __init__(self, name: str):
        super().__init__(max_workers=1, thread_name_prefix=name)
        self._since: float | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._timed, function, *args, **kwargs)

    def _timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._since = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            self._since = None

    @property
    def busy_s(self) -> float:
        """For how long it has been at one thing; 0 where it waits for something to do."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
