"""What a model ranks: the catalogue's vectors, users' vectors, and where targets stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core.batch import Batch, collate
from mvrec_core.calibration import CalibrationSums
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.config import Config
from mvrec_core.features import MISSING_TIME
from mvrec_core.metrics import Ranks, ranks
from mvrec_core.model import ROWS_GRAIN, ItemViews, MVRec
from mvrec_core.policy import Filter, eligible
from mvrec_core.sequences import Examples, Histories, stage_examples

CHUNK = 65_536  # items that are encoded together
PAIRS = 1 << 25  # of a user and an item, that are scored together: 128 MiB, and ten times as much to calibrate them


@torch.no_grad()
def catalogue(model: MVRec, chunk: int = CHUNK) -> tuple[ItemViews, Tensor]:
    """The item-level views of all N rows, and their unit vectors [N, D]; PAD and UNKNOWN are zero."""
    model.eval()
    rows = torch.arange(model.n_rows, device=model.popularity.device)
    parts = (model.item_views(part) for part in rows.split(chunk))
    views = ItemViews(*_joined(((part.z, part.present) for part in parts), len(rows)))
    return views, item_vectors(model, views, chunk)[0]


@torch.no_grad()
def item_vectors(model: MVRec, views: ItemViews, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """MVRec.item_vectors of a whole catalogue, a chunk at a time: on the way it needs the views twice more."""
    n = len(views.z)
    parts = (model.item_vectors(views[start : start + chunk]) for start in range(0, n, chunk))
    vector_ND, weight_NK = _joined(parts, n)
    return vector_ND, weight_NK


def _joined(parts: Iterable[tuple[Tensor, ...]], n: int) -> list[Tensor]:
    """n rows, at least one, of each tensor as parts come: to keep them for torch.cat would take as much again."""
    whole: list[Tensor] = []
    done = 0
    for part in parts:
        whole = whole or [tensor.new_empty(n, *tensor.shape[1:]) for tensor in part]
        for all_rows, some in zip(whole, part, strict=True):
            all_rows[done : done + len(some)] = some
        done += len(part[0])
    return whole


@dataclass(frozen=True)
class Users:
    """What B users' scores follow from.

    vector: [B, D], unit vectors
    row:    int64 [B, L], catalogue rows of what each has had
    lift:   float [B, L], what these score more for it (see repeats.py); 0 where a row stands again or nothing is lifted
    """

    vector: Tensor
    row: Tensor
    lift: Tensor

    @staticmethod
    def plain(vector_BD: Tensor) -> Users:
        """Users for whom nothing is lifted."""
        nothing = vector_BD.new_zeros(len(vector_BD), 0)
        return Users(vector_BD, nothing.long(), nothing)

    @staticmethod
    def together(users: Sequence[Users]) -> Users:
        vector = torch.cat([one.vector for one in users])
        longest = max(one.row.shape[1] for one in users)
        padded = [[F.pad(x, (0, longest - x.shape[1])) for x in (one.row, one.lift)] for one in users]
        return Users(vector, torch.cat([row for row, _ in padded]), torch.cat([lift for _, lift in padded]))

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, users: Any) -> Users:
        """Some of them, by a slice or a list."""
        return Users(self.vector[users], self.row[users], self.lift[users])

    def copy(self) -> Users:
        """The same, which keeps no others in memory."""
        return Users(self.vector.clone(), self.row.clone(), self.lift.clone())

    def scores(self, model: MVRec, items_ND: Tensor) -> Tensor:
        """float32 [B, N]: of all catalogue rows."""
        scores_BN = (self.vector @ items_ND.T / model.tau + model.bias).float()
        return scores_BN.scatter_add_(1, self.row, self.lift)

    def lifts(self, rows_n: Tensor) -> Tensor:
        """float [B, n]: what some rows score more."""
        return ((self.row[:, :, None] == rows_n) * self.lift[..., None]).sum(1)


@torch.no_grad()
def encode(
    model: MVRec, histories: Histories, examples: Examples, views: ItemViews, items_ND: Tensor, timed: bool = True
) -> Users:
    """Users after the last step of each example; with `timed` False nobody says when it is that the next event is asked
    for. `views` and `items_ND` are the catalogue's."""
    if model.training:  # to say it again takes 0.5 ms
        model.eval()
    batch = collate(histories, examples).to(model.popularity.device)
    if not timed:
        batch = replace(batch, now=torch.full_like(batch.now, int(MISSING_TIME)))
    needed, row = batch.item.unique(return_inverse=True)  # of a large catalogue a batch reads few items
    needed = F.pad(needed, (0, -len(needed) % ROWS_GRAIN), value=PAD)
    vector_BD = model.last_vectors(batch, views[needed], row)
    mass_BL = masses(model, batch, items_ND)
    if mass_BL is None:
        return Users.plain(vector_BD)
    same_BLL = batch.item[:, :, None] == batch.item[:, None]
    first_BL = ~same_BLL.tril(-1).any(2)
    return Users(vector_BD, batch.item, (same_BLL * mass_BL[:, None]).sum(2).log1p() * first_BL)


def encoded(
    model: MVRec,
    histories: Histories,
    examples: Examples,
    views: ItemViews,
    items_ND: Tensor,
    size: int,
    timed: bool = True,
) -> Iterator[tuple[Examples, Users]]:
    """What `encode` makes of `size` examples at a time, no more users at once than have PAIRS scores."""
    at_once = max(1, PAIRS // len(items_ND))
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        users = encode(model, histories, part, views, items_ND, timed)
        for first in range(0, len(part), at_once):
            some = slice(first, first + at_once)
            yield part[some], users[some]


def masses(model: MVRec, batch: Batch, items_ND: Tensor) -> Tensor | None:
    """m [B, L] of each step for what follows the last one (see repeats.py); None for a model without repeats."""
    if model.repeats is None:
        return None
    mass_BTL = model.repeats(batch, F.embedding(batch.item, items_ND))
    return mass_BTL[torch.arange(len(batch.item), device=mass_BTL.device), batch.length]


@torch.no_grad()
def view_weights(model: MVRec, histories: Histories, config: Config) -> dict[str, float] | None:
    """The mean weight of each item- and event-level view over all steps of some users of validation; None where there
    is none."""
    examples = stage_examples(histories, "valid", config.model.max_len)[: config.evaluate.batch_size]
    if not len(examples):
        return None
    model.eval()
    batch = collate(histories, examples).to(model.popularity.device)
    rows, row_BL = batch.item.unique(return_inverse=True)
    weight_BLK = model.step_weights(batch, model.item_views(rows), row_BL)
    steps = int((weight_BLK.sum(-1) > 0).sum())
    if not steps:
        return None
    names = (model.item_view_names + model.event_view_names)[: weight_BLK.shape[-1]]
    return dict(zip(names, (weight_BLK.sum((0, 1)) / steps).tolist(), strict=True))


@torch.no_grad()
def rank_targets(model: MVRec, histories: Histories, examples: Examples, config: Config) -> Ranks:
    """Where the target of each example stands in the whole catalogue; seen items are left out if so configured."""
    exclude_seen = config.evaluate.exclude_seen
    scored = _scored(model, histories, examples, config)
    return Ranks.concatenate(rank_scores(scores_BN, histories, part, exclude_seen) for part, scores_BN in scored)


@torch.no_grad()
def pair_sums(
    model: MVRec, histories: Histories, examples: Examples, config: Config, among: Tensor | None = None
) -> CalibrationSums:
    """How the probabilities of all pairs of a user and a candidate came true; among: the rows of the candidates, int64
    [n], None: all."""
    sums = CalibrationSums.empty()
    for part, scores_BN in _scored(model, histories, examples, config):
        target, allowed_BN = candidates(
            histories, part, config.evaluate.exclude_seen, scores_BN.shape[1], scores_BN.device
        )
        if among is not None:
            allowed_BN &= torch.zeros_like(allowed_BN[:1]).index_fill(1, among, True)
        outcome_BN = torch.zeros_like(allowed_BN)
        there = np.flatnonzero(target >= 0)
        outcome_BN[there, target[there]] = True
        sums += CalibrationSums.of(scores_BN[allowed_BN], outcome_BN[allowed_BN])
    return sums


def _scored(
    model: MVRec, histories: Histories, examples: Examples, config: Config
) -> Iterator[tuple[Examples, Tensor]]:
    """Some examples at a time, and their scores of all rows, float32 [B, N]."""
    views, items_ND = catalogue(model)
    for part, users in encoded(model, histories, examples, views, items_ND, config.evaluate.batch_size):
        yield part, users.scores(model, items_ND)


def rank_scores(scores_BN: Tensor, histories: Histories, examples: Examples, exclude_seen: bool) -> Ranks:
    """Ranks of the examples' targets by scores over all catalogue rows: the protocol of every model and baseline."""
    target_B, allowed_BN = candidates(histories, examples, exclude_seen, scores_BN.shape[1], scores_BN.device)
    return ranks(scores_BN, target_B, ~allowed_BN)


def candidates(
    histories: Histories, examples: Examples, exclude_seen: bool, n_rows: int, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, Tensor]:
    """The examples' targets int64 [B], -1 for one outside the catalogue, and which rows may be ranked, bool [B, N]."""
    before = [
        histories.item[histories.events_of(user, stop)] for user, stop in zip(examples.user, examples.stop, strict=True)
    ]
    allowed_BN = eligible([Filter(seen if exclude_seen else ()) for seen in before], n_rows, device)
    target = histories.item[histories.offsets[examples.user] + examples.stop]
    return np.where(target >= FIRST, target, -1), allowed_BN
