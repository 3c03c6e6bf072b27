"""Why an item was recommended: the events and views that carried its score, and the rank it would have without a view.

    score = baseline + sum of the contributions + error

A contribution belongs to one item-level view i of one event t. It is an integrated gradient (Sundararajan, Taly and
Yan, "Axiomatic Attribution for Deep Networks", ICML 2017) of s(u, j) along the straight line from the mean item's z to
the event's own:

    c_ti = (z_ti - m_i) . integral over a in [0, 1] of  ds / dz_ti  at  m + a (z - m)

so that they add up to s(u, j) - baseline (its axiom of completeness). The baseline is the score after the same history
with the mean item in every event: what the profile, the times, the ratings and the item's own popularity give. A zero
baseline would stand outside of what the model knows: its first layer normalises, so the whole change of the score
would happen next to zero. The integral is a Gauss-Legendre sum, whose error is what is left over and is reported; nodes
are doubled until it is below 1% of the sum of the contributions' sizes (on 640 items of
MovieLens-100K: 0.09% at most).

Shapes: B users, L steps, N catalogue rows, K item-level views, D dimensions, k items to explain a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvrec_core import ranking
from mvrec_core.batch import Batch, collate
from mvrec_core.catalog import FIRST, PAD, Catalog
from mvrec_core.features import MISSING_TIME
from mvrec_core.masking import hide_histories, hide_items, removable
from mvrec_core.model import ItemViews, MVRec
from mvrec_core.requests import MICROSECONDS
from mvrec_core.sequences import Examples, Histories

NODES, MOST_NODES = 8, 64
TOLERANCE = 0.01  # of the sum of the contributions' sizes


@dataclass(frozen=True)
class Contribution:
    """What one event of the history adds to a score: `views` says through which view, `again` what it adds since it is
    of the same item (see repeats.py); together they add up to `score`."""

    item_id: str
    display: str | None
    timestamp: float | None  # Unix seconds
    score: float
    views: dict[str, float]
    again: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """Of one recommended item.

    views:    its view weights, which sum to 1 (all 1 with linear fusion, which has none)
    baseline: its score had every event been of the mean item
    events:   oldest first; those of items that are not in the catalogue add nothing and are left out
    error:    score - baseline - sum of the events' scores
    ranks:    for each view, the rank that the item would have if that view were not there
    """

    views: dict[str, float]
    baseline: float
    events: list[Contribution]
    error: float
    ranks: dict[str, int]


@dataclass(frozen=True)
class Attribution:
    """contribution [B, k, L, K], baseline [B, k], score [B, k]"""

    contribution: Tensor
    baseline: Tensor
    score: Tensor

    @property
    def error(self) -> Tensor:
        """[B, k]: what the contributions lack."""
        return self.score - self.baseline - self.contribution.sum((-1, -2))


@dataclass(frozen=True)
class Explainer:
    """A model with its catalogue: views and weights [N, K], unit vectors items [N, D]."""

    model: MVRec
    catalog: Catalog
    views: ItemViews
    weights: Tensor
    items: Tensor

    def explain(
        self, histories: Histories, examples: Examples, index: Sequence[np.ndarray], eligible_BN: Tensor
    ) -> list[list[Explanation]]:
        """Of each example's items (catalogue rows), in their order. eligible_BN: what they are ranked among."""
        index_Bk = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(rows) for rows in index], True, PAD)
        index_Bk = index_Bk.to(self.items.device)
        batch = collate(histories, examples).to(self.items.device)
        found = attribute(self.model, batch, self.views, self.items[index_Bk])
        again_BkL = self._again(batch, index_Bk)
        ranks = self._ranks_without(histories, examples, index_Bk, eligible_BN)
        return [
            [
                Explanation(
                    views=self.named(self.weights[row].tolist()),
                    baseline=float(found.baseline[b, place]),
                    events=self._events(batch, b, found.contribution[b, place], again_BkL[b, place].tolist()),
                    error=float(found.error[b, place]),
                    ranks={name: int(rank_Bk[b, place]) for name, rank_Bk in ranks.items()},
                )
                for place, row in enumerate(rows)
            ]
            for b, rows in enumerate(index)
        ]

    def named(self, values: Sequence[float]) -> dict[str, float]:
        """One value for each item-level view, by its name."""
        return dict(zip(self.model.item_view_names, values, strict=True))

    @torch.no_grad()
    def _again(self, batch: Batch, index_Bk: Tensor) -> Tensor:
        """[B, k, L]: each item's lift, shared out over the events of it by their masses."""
        mass_BL = ranking.masses(self.model, batch, self.items)
        if mass_BL is None:
            return torch.zeros(*index_Bk.shape, batch.item.shape[1], device=index_Bk.device)
        mass_BkL = mass_BL[:, None] * (batch.item[:, None] == index_Bk[..., None])
        total_Bk1 = mass_BkL.sum(-1, keepdim=True)
        return mass_BkL * total_Bk1.log1p() / total_Bk1.clamp(min=1e-12)

    def _events(self, batch: Batch, b: int, contribution_LK: Tensor, again_L: Sequence[float]) -> list[Contribution]:
        out = []
        steps = zip(batch.item[b].tolist(), batch.time[b].tolist(), contribution_LK, again_L, strict=True)
        for row, time, parts, again in steps:
            if row >= FIRST:
                when = None if time == MISSING_TIME else time / MICROSECONDS
                shown, name = self.catalog.display[row - FIRST], self.catalog.ids.value(row)
                out.append(
                    Contribution(name, shown, when, float(parts.sum()) + again, self.named(parts.tolist()), again)
                )
        return out

    @torch.no_grad()
    def _ranks_without(
        self, histories: Histories, examples: Examples, index_Bk: Tensor, eligible_BN: Tensor
    ) -> dict[str, Tensor]:
        """{view: int64 [B, k]}: ranks from 1 among the eligible; where scores are equal the lower row first."""
        ranks, config = {}, self.model.config
        column_N = torch.arange(len(self.items), device=self.items.device)
        for name in removable(config):
            views = hide_items(self.views, config, {name})
            items_ND, _ = ranking.item_vectors(self.model, views)
            shown = hide_histories(histories, config, {name})
            scores_BN = ranking.encode(self.model, shown, examples, views, items_ND).scores(self.model, items_ND)
            columns = []
            for index_B in index_Bk.T:
                own_B1 = scores_BN.gather(1, index_B[:, None])
                before_BN = (scores_BN > own_B1) | ((scores_BN == own_B1) & (column_N < index_B[:, None]))
                columns.append(1 + (before_BN & eligible_BN).sum(1))
            ranks[name] = torch.stack(columns, 1)
        return ranks


def attribute(model: MVRec, batch: Batch, views: ItemViews, items_BkD: Tensor, nodes: int = NODES) -> Attribution:
    """The contributions of a batch's events to the scores of some items' unit vectors, k for each user.

    views: of the whole catalogue. `nodes` is where the number of Gauss-Legendre nodes starts.
    """
    while True:
        found = _attribute(model, batch, views, items_BkD, nodes)
        size_Bk = found.contribution.abs().sum((-1, -2))
        if nodes >= MOST_NODES or bool((found.error.abs() <= TOLERANCE * size_Bk + 1e-4).all()):
            return found
        nodes *= 2


def _attribute(model: MVRec, batch: Batch, views: ItemViews, items_BkD: Tensor, nodes: int) -> Attribution:
    present_BLK = views.present[batch.item]
    mean_KD = mean_item(views)
    away_BLKD = torch.where(present_BLK[..., None], views.z[batch.item] - mean_KD, 0.0)
    row_BL = torch.arange(batch.item.numel(), device=batch.item.device).view(batch.item.shape)
    flat_present = present_BLK.flatten(0, 1)

    def scores(share: float | Tensor) -> Tensor:
        z = (mean_KD + share * away_BLKD).flatten(0, 1)
        users_BTD = model.user_vectors(batch, ItemViews(z, flat_present), row_BL)
        users_BD = users_BTD[torch.arange(len(batch.item), device=z.device), batch.length]
        return torch.einsum("bd,bkd->bk", users_BD, items_BkD) / model.tau + model.bias

    contribution = torch.zeros(*items_BkD.shape[:2], *present_BLK.shape[1:], device=items_BkD.device)
    place, weight = np.polynomial.legendre.leggauss(nodes)  # of [-1, 1]
    for x, w in zip((place + 1) / 2, weight / 2, strict=True):
        with torch.enable_grad():
            # a gradient by the share of each z_ti on its own line is (z_ti - m_i) . ds / dz_ti at once
            share = torch.full((*present_BLK.shape, 1), float(x), device=items_BkD.device, requires_grad=True)
            total_k = scores(share).sum(0)  # users of a batch do not see each other
            for slot, total in enumerate(total_k):
                (slope,) = torch.autograd.grad(total, share, retain_graph=slot + 1 < len(total_k))
                contribution[:, slot] += float(w) * slope[..., 0]
    with torch.no_grad():
        return Attribution(contribution, scores(0.0), scores(1.0))


def mean_item(views: ItemViews) -> Tensor:
    """[K, D]: the mean z of each view over the catalogue's items that have it."""
    there_NK1 = views.present[..., None]
    return (views.z * there_NK1).sum(0) / there_NK1.sum(0).clamp(min=1)


@dataclass(frozen=True)
class ViewUse:
    """Of one history's steps, by item- and event-level view: the mean weight, and the share of steps that lack the
    view. Both are {} where there is no step."""

    weights: dict[str, float]
    missing: dict[str, float]


@torch.no_grad()
def view_use(model: MVRec, histories: Histories, examples: Examples, views: ItemViews) -> list[ViewUse]:
    """What each example's steps make of the views. A view that is not there has no weight, and one that is has some."""
    model.eval()
    batch = collate(histories, examples).to(views.z.device)
    weight_BLK = model.step_weights(batch, views, batch.item)
    names = (model.item_view_names + model.event_view_names)[: weight_BLK.shape[-1]]
    step_BL = weight_BLK.sum(-1) > 0
    steps_B1 = step_BL.sum(1, keepdim=True)
    mean_BK = weight_BLK.sum(1) / steps_B1.clamp(min=1)
    lack_BK = ((weight_BLK == 0) & step_BL[..., None]).sum(1) / steps_B1.clamp(min=1)
    return [
        ViewUse(dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, lack.tolist(), strict=True)))
        if steps
        else ViewUse({}, {})
        for mean, lack, steps in zip(mean_BK, lack_BK, steps_B1[:, 0].tolist(), strict=True)
    ]


def user_weights(model: MVRec, histories: Histories, examples: Examples, views: ItemViews) -> list[dict[str, float]]:
    """The mean view weights W_t of each example's steps, of item- and event-level views; {} where there is no step."""
    return [use.weights for use in view_use(model, histories, examples, views)]
