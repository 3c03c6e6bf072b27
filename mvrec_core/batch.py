"""Tensors from histories: the same collate for training, evaluation and serving.

Shapes: B examples, L steps of the longest, T = L + 1 outputs (the first knows just the profile), M values a category.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvrec_core.catalog import PAD
from mvrec_core.features import MISSING_TIME
from mvrec_core.sequences import Examples, Histories


@dataclass(frozen=True)
class Batch:
    """
    item:   int64 [B, L], PAD behind a shorter history
    time:   int64 [B, L] microseconds, MISSING_TIME where missing
    now:    int64 [B, T] microseconds, when what follows each step happened or is asked for, MISSING_TIME where unknown
    length: int64 [B], steps of each
    target: int64 [B, T], the item that follows each step, PAD where there is none to predict
    event:  {view: [B, L] or [B, L, M]}
    kind:   int64 [B, T, M], the categories of the target event in the view that was asked for; M is 0 where none was
    user:   {view: [B] or [B, M]}
    others: int64 [Q], targets that other workers, or other parts of a batch, read in the same step
    """

    item: Tensor
    time: Tensor
    now: Tensor
    length: Tensor
    target: Tensor
    event: dict[str, Tensor]
    kind: Tensor
    user: dict[str, Tensor]
    others: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """On a GPU the copy of what is pinned goes on while other work is done."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU can read by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {
            name: {k: change(v) for k, v in value.items()} if isinstance(value, dict) else change(value)
            for name, value in values
        }
        return Batch(**changed)


def collate(histories: Histories, examples: Examples, kind: str | None = None, others: Examples | None = None) -> Batch:
    """The batch of some examples, on the CPU; `kind` names the category view of targets. L is `rounded`."""
    length = examples.stop - examples.start
    step = np.arange(rounded(int(length.max(initial=0))))
    inside = step < length[:, None]
    first = histories.offsets[examples.user] + examples.start
    row = np.where(inside, first[:, None] + step, 0)

    place = np.arange(len(step) + 1)
    position = examples.start[:, None] + place
    wanted = (position >= examples.first[:, None]) & (position < examples.limit[:, None])
    following = np.where(wanted, first[:, None] + place, 0)
    size = histories.offsets[examples.user + 1] - histories.offsets[examples.user]
    followed = (place <= length[:, None]) & (position < size[:, None])
    now = _padded(histories.time, np.where(followed, first[:, None] + place, 0), followed, MISSING_TIME)
    asked = examples.stop == size
    now[asked, length[asked]] = histories.now[examples.user[asked]]
    kinds = histories.event[kind] if kind is not None else np.zeros((len(histories.item), 0), np.int64)
    return Batch(
        item=torch.from_numpy(_padded(histories.item, row, inside, PAD)),
        time=torch.from_numpy(_padded(histories.time, row, inside, MISSING_TIME)),
        now=torch.from_numpy(now),
        length=torch.from_numpy(length),
        target=torch.from_numpy(_padded(histories.item, following, wanted, PAD)),
        event={name: torch.from_numpy(_padded(v, row, inside, missing(v))) for name, v in histories.event.items()},
        kind=torch.from_numpy(_padded(kinds, following, wanted, PAD)),
        user={name: torch.from_numpy(values[examples.user]) for name, values in histories.user.items()},
        others=torch.from_numpy(np.zeros(0, np.int64) if others is None else histories.targets(others)),
    )


def rounded(count: int, octave: int = 3) -> int:
    """A number of steps or rows, or somewhat more: one of 2^octave in each octave, by default up to an eighth more. A
    matrix product whose shape was not seen before costs several times as much on a CPU, since its kernel has to be
    compiled, and the kernel stays in memory."""
    grain = 1 << max(0, (count - 1).bit_length() - 1 - octave)
    return -(-count // grain) * grain


def missing(values: np.ndarray) -> int | float:
    """What stands for no value in a view's array as Fitted.encode gives it: NaN, PAD or MISSING_TIME."""
    if values.dtype.kind == "f":
        return np.nan
    return PAD if values.ndim == 2 else MISSING_TIME


def _padded(values: np.ndarray, row: np.ndarray, inside: np.ndarray, filler: int | float) -> np.ndarray:
    if not len(values):
        return np.full((*row.shape, *values.shape[1:]), filler, values.dtype)
    mask = inside.reshape(inside.shape + (1,) * (values.ndim - 1))
    return np.where(mask, values[row], np.asarray(filler, values.dtype))
