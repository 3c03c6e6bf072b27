"""The encoders of the views but text: a view's values -> z [..., D] and present bool [...]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mvrec_core.catalog import FIRST, PAD
from mvrec_core.features import MISSING_TIME

SECOND = 1_000_000  # in microseconds
RARE = 0.001  # share of all gaps
GAPS = 32  # buckets of a time gap, powers of two of a second; the last is for an unknown gap


class Encoders(nn.ModuleDict):
    """The encoder of each view by the view's name, which may be that of an attribute of a module, such as "type"."""

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(_free(name))

    def __setitem__(self, name: str, encoder: nn.Module) -> None:
        super().__setitem__(_free(name), encoder)


def _free(name: str) -> str:
    return f"{name}:" if hasattr(nn.ModuleDict, name) else name  # a view's name has no colon


class IdEncoder(nn.Module):
    """item [...] -> its embedding; an UNKNOWN item has none."""

    def __init__(self, n_items: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_items, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, item: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(item), item >= FIRST


class CategoryEncoder(nn.Module):
    """values int64 [..., M] -> the mean of their embeddings."""

    def __init__(self, n_values: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_values, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        there = (values != PAD).unsqueeze(-1)
        count = there.sum(-2)
        return (self.embedding(values) * there).sum(-2) / count.clamp(min=1), count.squeeze(-1) > 0


class NumberEncoder(nn.Module):
    """standardised values float [...] -> a two-layer projection."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        present = ~values.isnan()
        return self.net(values.nan_to_num().clamp(-5, 5).unsqueeze(-1)), present


class VectorEncoder(nn.Module):
    """standardised values float [..., S], NaN where there are none -> dropout and a linear projection."""

    def __init__(self, size: int, dim: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(size, dim))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        present = ~values.isnan().all(-1)
        return self.net(values.nan_to_num().clamp(-5, 5)), present


class TimeEncoder(nn.Module):
    """times int64 [..., L] in microseconds, oldest first -> gap before, hour of the day and weekday (UTC)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gap = nn.Embedding(GAPS, dim)
        self.hour = nn.Embedding(24, dim)
        self.weekday = nn.Embedding(7, dim)
        for table in (self.gap, self.hour, self.weekday):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        present = time != MISSING_TIME
        before = torch.cat([torch.full_like(time[..., :1], MISSING_TIME), time[..., :-1]], dim=-1)
        hour, weekday = calendar(torch.where(present, time, 0))
        return self.gap(gap_bucket(before, time)) + self.hour(hour) + self.weekday(weekday), present


class GapEncoder(nn.Module):
    """The time from a step until what follows it, up to now for the last one: time, now int64 [B, T] in microseconds
    -> [B, T, D]. A gap longer than nearly all of training's counts as the longest that is well known there."""

    longest: Tensor  # its bucket

    def __init__(self, dim: int):
        super().__init__()
        self.gap = nn.Embedding(GAPS, dim)
        nn.init.normal_(self.gap.weight, std=dim**-0.5)
        self.register_buffer("longest", torch.tensor(0))

    def learn_from(self, counts: np.ndarray) -> None:
        """counts [GAPS]: gaps of training by bucket. Those beyond the last bucket that holds a thousandth of them are
        too few to be told apart: a user who comes back after years is one who comes back after months."""
        often = np.flatnonzero(counts[: GAPS - 1] >= RARE * counts[: GAPS - 1].sum().clip(min=1))
        self.longest.fill_(int(often.max(initial=0)))

    def forward(self, time: Tensor, now: Tensor) -> Tensor:
        bucket = gap_bucket(time, now)
        return self.gap(torch.where(bucket < GAPS - 1, bucket.minimum(self.longest), bucket))


def calendar(time: Tensor) -> tuple[Tensor, Tensor]:
    """int64 microseconds -> hour of the day, and weekday from 0, Monday (UTC)."""
    hours = time.div(3600 * SECOND, rounding_mode="floor")
    return hours % 24, (hours.div(24, rounding_mode="floor") + 3) % 7  # 1970-01-01 was a Thursday


def gap_bucket(earlier: Tensor, later: Tensor) -> Tensor:
    """int64: 0 under a second, else 1 + floor(log2 of the seconds), at most GAPS - 2; GAPS - 1 if a time is missing."""
    known = (earlier != MISSING_TIME) & (later != MISSING_TIME)
    seconds = torch.where(known, (later - earlier).clamp(min=0), 0).div(SECOND, rounding_mode="floor")
    bucket = torch.where(seconds > 0, seconds.clamp(min=1).double().log2().floor().long() + 1, 0).clamp(max=GAPS - 2)
    return torch.where(known, bucket, GAPS - 1)
