"""A file that is read again when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from mvrec_core.errors import MVRecError

LOOK_EVERY_S = 0.5

T = TypeVar("T")


class LiveFile(Generic[T]):
    """Raises what `load` raises where the file is wrong from the start; where it becomes wrong later the value stays as
    it was, and that is reported once."""

    def __init__(self, path: Path, load: Callable[[Path], T], report: Callable[[MVRecError], None]):
        self.path = path
        self._load = load
        self._report = report
        self._stamp = self._now()  # before it is read: what is written meanwhile is read twice rather than never
        self._looked = time.monotonic()
        self.value = load(path)

    def read(self) -> T:
        """What the file says now, or said half a second ago."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self.value = self._load(self.path)
                except MVRecError as error:
                    self._report(error)
        return self.value

    def _now(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
