"""What may be recommended. The mask is made before top-k, so a filter never shortens a list that could be full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvrec_core.catalog import PAD, UNKNOWN

Indices = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Filter:
    """One request's filters, in catalogue indices.

    seen:  items not to repeat; the caller leaves it empty where repeats are wanted
    allow: the only items that may come, or None for all; an empty one lets nothing through
    deny:  items that must not come; it wins over allow
    masks: bool [N] each, all of which have to let an item through; several requests may hold the same one
    """

    seen: Indices = ()
    allow: Indices | None = None
    deny: Indices = ()
    masks: Sequence[Tensor] = ()


def eligible(filters: Sequence[Filter], n_rows: int, device: str | torch.device = "cpu") -> Tensor:
    """bool [B, n_rows]: True where row j of the catalogue may be recommended to request b. PAD and UNKNOWN never are.

    Raises ValueError for an index outside 0 .. n_rows - 1.
    """
    limited_B = torch.tensor([f.allow is not None for f in filters], dtype=torch.bool, device=device)
    mask_BN = ~limited_B[:, None].repeat(1, n_rows)
    _set(mask_BN, [() if f.allow is None else f.allow for f in filters], True)
    _set(mask_BN, [f.seen for f in filters], False)
    _set(mask_BN, [f.deny for f in filters], False)
    mask_BN[:, [PAD, UNKNOWN]] = False
    _narrow(mask_BN, filters)
    return mask_BN


def _narrow(mask_BN: Tensor, filters: Sequence[Filter]) -> None:
    """Each distinct mask once, over all requests that hold it."""
    asking: dict[int, tuple[Tensor, list[int]]] = {}
    for b, one in enumerate(filters):
        for mask_N in one.masks:
            asking.setdefault(id(mask_N), (mask_N, []))[1].append(b)
    for mask_N, requests in asking.values():
        mask_N = mask_N.to(mask_BN.device)
        if len(requests) == len(mask_BN):
            mask_BN &= mask_N
        else:
            mask_BN[requests] &= mask_N


def _set(mask_BN: Tensor, columns: Sequence[Indices], value: bool) -> None:
    """Writes `value` at the given columns of each row, all rows at once."""
    sizes = torch.tensor([len(row) for row in columns], dtype=torch.int64)
    if not int(sizes.sum()):
        return
    column = torch.cat([torch.as_tensor(row, dtype=torch.int64).cpu() for row in columns])
    if int(column.min()) < 0 or int(column.max()) >= mask_BN.shape[1]:
        raise ValueError(f"expected indices in 0 .. {mask_BN.shape[1] - 1}, found {column.min()} .. {column.max()}")
    row = torch.repeat_interleave(torch.arange(len(columns)), sizes)
    mask_BN[row.to(mask_BN.device), column.to(mask_BN.device)] = value
