"""A file, here or in an object store, that is read again when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from mvrec_core import places
from mvrec_core.errors import MVRecError

LOOK_EVERY_S = 0.5
STORE_EVERY_S = 5.0  # where each look is a request

T = TypeVar("T")


class LiveFile(Generic[T]):
    """Raises what `load` raises where the file is wrong from the start; where it becomes wrong later the value stays as
    it was, and that is reported once."""

    def __init__(self, path: str, load: Callable[[str], T], report: Callable[[MVRecError], None]):
        """path: or a URI; then `read` may wait for the network."""
        self.path = path
        self._every_s = STORE_EVERY_S if places.is_uri(path) else LOOK_EVERY_S
        self._load = load
        self._report = report
        self._stamp = self._now()  # before it is read: what is written meanwhile is read twice rather than never
        self._looked = time.monotonic()
        self.value = load(path)

    def read(self) -> T:
        """What the file says now, or said half a second ago; five seconds in an object store."""
        if time.monotonic() - self._looked >= self._every_s:
            self._looked = time.monotonic()
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self.value = self._load(self.path)
                except MVRecError as error:
                    self._report(error)
        return self.value

    def _now(self) -> Hashable:
        """What differs where the file does; None where it cannot be looked at."""
        try:
            if places.is_uri(self.path):
                return places.read(self.path)
            status = Path(self.path).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
