"""The errors that a user can meet. Each message is one sentence: what was expected, what was there, and where.

MVRecError              anything a command turns into one line and a non-zero exit
├── ConfigError         a key or a value of the configuration
├── DataError           a file, a row or a column of the logs, or a prepared data set
├── CheckpointError     a checkpoint directory: missing, damaged, of another version
├── RequestError        a request for recommendations; it also names the offending field
└── ResourceError       what the machine or the cluster lacks: cores, a port, a device
    ├── StateUnavailable    the store of live events and items, which may be back the next moment
    └── Overloaded          time: more is asked than can be answered before its deadline
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MVRecError(Exception):
    """Root of the tree; its text is shown to the user as it is."""


class ConfigError(MVRecError):
    pass


class DataError(MVRecError):
    pass


class CheckpointError(MVRecError):
    pass


class RequestError(MVRecError):
    """A request that cannot be answered; `field` names the part of the request at fault, `status` the HTTP answer."""

    def __init__(self, message: str, field: str | None = None, status: int = 422):
        super().__init__(message)
        self.field = field
        self.status = status


class ResourceError(MVRecError):
    pass


class StateUnavailable(ResourceError):
    pass


class Overloaded(ResourceError):
    """`retry_after_s`: when it may be better."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


def first_line(error: Exception) -> str:
    """What a library says, without the lines that are for its developers."""
    return str(error).partition("\n")[0]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that helps with a misspelt name: the closest valid one, or all of them when none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(valid) or 'none'}"
