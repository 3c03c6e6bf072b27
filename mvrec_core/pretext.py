"""What pretraining asks of the views: hidden ones are told from the others, and an item's text lies near its id.

Shapes: B users, L steps, T = L + 1 outputs, K views of a step, n distinct items of the batch, D dimensions, P hidden
values or pairs, C candidates, V values of a vocabulary, M values of a category.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core.batch import Batch
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.encoders import calendar
from mvrec_core.features import MISSING_TIME
from mvrec_core.model import ItemViews, MVRec
from mvrec_core.views import View

HIDDEN = 0.3  # share of the steps at which a view is hidden, and of the users of whom one is
TEMPERATURE = 0.1  # of all contrasts
ALIGNED = 1024  # items or pairs of a step that are aligned


class Pretext(nn.Module):
    """The model, and one layer a view that turns a state into a guess at the view's hidden value.

    A guess at a category is compared with the embeddings of its vocabulary, at a time with those of hours and
    weekdays, at an id, text or any other vector with those of the batch's items: all are the model's own, so they
    learn too. A number is guessed as it is, standardised.
    """

    def __init__(self, model: MVRec):
        super().__init__()
        self.model = model
        self.views = model.config.views
        dim = model.config.model.dim
        self.guess = nn.ModuleDict(
            {name: nn.Linear(dim, 1 if view.kind == "number" else dim) for name, view in self.views.items()}
        )
        kinds = {view.kind: name for name, view in self.views.items() if view.kind in ("id", "text")}
        self.item_id, self.text = kinds.get("id"), kinds.get("text")
        aligned = [f"{self.text}~{self.item_id}"] if self.text and self.item_id else []
        aligned += [f"{self.text}~next"] if self.text else []
        self.parts = [*self.views, *aligned]

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """-> the loss, the sum of the means of all parts; those means; and which have one, 0 or 1: [parts] each."""
        model = self.model
        needed, row_BL = batch.item.unique(return_inverse=True)
        live = None
        if model.text is not None and model.text.tuned:
            live = model.text.choose_live(needed, needed[:0], generator)
        views = model.item_views(needed, live)
        hidden_BL, profile_B = self._choose(batch, views, row_BL, generator)
        states_BTD = model.user_vectors(*self._hide(batch, views, row_BL, hidden_BL, profile_B))
        states_BTD = states_BTD * states_BTD.shape[-1] ** 0.5  # as long as before they were made unit vectors
        last_BD = states_BTD[torch.arange(len(row_BL), device=row_BL.device), batch.length]
        losses: dict[str, Tensor] = {}
        for place, name in enumerate(self._step_views):
            at = hidden_BL == place
            if at.any():
                values = batch.event[name][at] if name in batch.event else None
                losses[name] = self._loss(name, states_BTD[:, 1:][at], views, needed, row_BL[at], values)
        for place, name in enumerate(model.user_view_names):
            at = profile_B == place
            if at.any():
                losses[name] = self._loss(name, last_BD[at], views, needed, row_BL[:0, 0], batch.user[name][at])
        losses |= self._align(views, needed, row_BL, generator)
        nothing = last_BD.new_zeros(())
        parts = torch.stack([losses.get(name, nothing).float() for name in self.parts])
        there = torch.tensor([float(name in losses) for name in self.parts], device=parts.device)
        # every parameter takes part in every step, whatever was hidden
        rest = sum((0.0 * p.sum() for p in self.parameters() if p.requires_grad), nothing)
        return parts.sum() + rest, parts.detach(), there

    @property
    def _step_views(self) -> list[str]:
        return [*self.model.item_view_names, *self.model.event_view_names]

    def _choose(
        self, batch: Batch, views: ItemViews, row_BL: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The view hidden at each step, int64 [B, L], and of each user, int64 [B]: a place in their names, or -1."""
        events = [_present(self.views[name], batch.event[name]) for name in self.model.event_view_names]
        item_BLK = views.present[row_BL]
        step_BLK = torch.cat([item_BLK, *(there[..., None] for there in events)], -1) & (batch.item != PAD)[..., None]
        users = [_present(self.views[name], batch.user[name]) for name in self.model.user_view_names]
        user_BK = torch.stack(users, -1) if users else step_BLK.new_zeros(len(row_BL), 1)
        return _one_of(step_BLK, generator), _one_of(user_BK, generator)

    def _hide(
        self, batch: Batch, views: ItemViews, row_BL: Tensor, hidden_BL: Tensor, profile_B: Tensor
    ) -> tuple[Batch, ItemViews, Tensor]:
        """What user_vectors reads: a step whose item lacks a view now has a row of its own behind the items'."""
        k = len(self.model.item_view_names)
        at = (hidden_BL >= 0) & (hidden_BL < k)
        here = row_BL[at]
        present = views.present[here].clone()
        present[torch.arange(len(here), device=here.device), hidden_BL[at]] = False
        views = ItemViews(torch.cat([views.z, views.z[here]]), torch.cat([views.present, present]))
        row_BL = row_BL.clone()
        row_BL[at] = torch.arange(len(views.z) - len(here), len(views.z), device=here.device)
        event = {
            name: _without(self.views[name], batch.event[name], hidden_BL == k + place)
            for place, name in enumerate(self.model.event_view_names)
        }
        user = {
            name: _without(self.views[name], batch.user[name], profile_B == place)
            for place, name in enumerate(self.model.user_view_names)
        }
        return dataclasses.replace(batch, event=event, user=user), views, row_BL

    def _loss(
        self, name: str, state_PD: Tensor, views: ItemViews, needed: Tensor, row_P: Tensor, values: Tensor | None
    ) -> Tensor:
        """The mean loss of the guesses at P hidden values: those in `values`, else those of the items in row_P."""
        kind = self.views[name].kind
        encoder: Any = self.model.encoders[name]
        guess_PD = self.guess[name](state_PD).float()
        if kind in ("category", "number", "time"):
            if values is None:
                values = getattr(self.model, f"feature_{name}")[needed[row_P]]
            if kind == "number":
                return F.mse_loss(guess_PD[:, 0], values.float().clamp(-5, 5))
            if kind == "category":
                return tell_values(guess_PD, encoder.embedding.weight, values)
            hour_P, weekday_P = calendar(values)
            return (
                contrast(guess_PD, encoder.hour.weight, hour_P) / 2
                + contrast(guess_PD, encoder.weekday.weight, weekday_P) / 2
            )
        k = self.model.item_view_names.index(name)
        there = views.present[:, k]
        same = self._same(name, needed)
        place = there.cumsum(0) - 1
        return contrast(guess_PD, views.z[there, k], place[row_P], same[row_P, None] == same[there])

    def _same(self, name: str, item: Tensor) -> Tensor:
        """What tells values of a view apart: for a text, which text it is."""
        return self.model.text.text_of[item] if name == self.text else item  # type: ignore[union-attr]

    def _align(self, views: ItemViews, needed: Tensor, row_BL: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """InfoNCE (van den Oord, Li and Vinyals, 2018) with the other items of the batch as negatives."""
        if self.text is None:
            return {}
        t = self.model.item_view_names.index(self.text)
        same, losses = self._same(self.text, needed), {}
        if self.item_id is not None:
            i = self.model.item_view_names.index(self.item_id)
            both = _some((views.present[:, t] & views.present[:, i]).nonzero()[:, 0], generator)
            if len(both) > 1:
                text, ident, own = views.z[both, t], views.z[both, i], torch.arange(len(both), device=both.device)
                twins = same[both, None] == same[both]
                pull = contrast(text, ident, own, twins) + contrast(ident, text, own, twins)
                losses[f"{self.text}~{self.item_id}"] = pull / 2
        one, other = row_BL[:, :-1].flatten(), row_BL[:, 1:].flatten()
        pairs = views.present[one, t] & views.present[other, t] & (same[one] != same[other])
        pairs = _some(pairs.nonzero()[:, 0], generator)
        one, other = one[pairs], other[pairs]
        if len(pairs) > 1:
            own = torch.arange(len(pairs), device=pairs.device)
            twins = (same[other, None] == same[other]) | (same[one, None] == same[other])  # a text is nearest to itself
            losses[f"{self.text}~next"] = contrast(views.z[one, t], views.z[other, t], own, twins)
        return losses


def contrast(query_PD: Tensor, key_CD: Tensor, target_P: Tensor, twin_PC: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of telling key target_P by its cosine with the query, over TEMPERATURE. Where twin_PC,
    a candidate other than the target is no negative."""
    logit_PC = F.normalize(query_PD.float(), dim=-1) @ F.normalize(key_CD.float(), dim=-1).T / TEMPERATURE
    if twin_PC is not None:
        logit_PC = logit_PC.masked_fill(twin_PC.scatter(1, target_P[:, None], False), -torch.inf)
    return F.cross_entropy(logit_PC, target_P)


def tell_values(query_PD: Tensor, key_VD: Tensor, values_PM: Tensor) -> Tensor:
    """The mean cross-entropy over a vocabulary, each value of a category as likely as its others; values that are not
    in the vocabulary are left out. 0 where none is left."""
    logit_PV = F.normalize(query_PD.float(), dim=-1) @ F.normalize(key_VD[FIRST:].float(), dim=-1).T / TEMPERATURE
    known_PM = values_PM >= FIRST
    if not known_PM.any():
        return 0.0 * logit_PV.sum()
    found_PM = logit_PV.log_softmax(-1).gather(1, (values_PM - FIRST).clamp(min=0)) * known_PM
    count_P = known_PM.sum(1)
    return -(found_PM.sum(1) / count_P.clamp(min=1))[count_P > 0].mean()


def _one_of(there_K: Tensor, generator: torch.Generator) -> Tensor:
    """bool [..., K] -> int64 [...]: in a share HIDDEN of the places one of those that are there, else -1."""
    drawn_K = torch.rand(there_K.shape, generator=generator).to(there_K.device).masked_fill(~there_K, -1.0)
    hide = torch.rand(there_K.shape[:-1], generator=generator).to(there_K.device) < HIDDEN
    return torch.where(hide & there_K.any(-1), drawn_K.argmax(-1), -1)


def _present(view: View, values: Tensor) -> Tensor:
    if view.kind == "category":
        return (values != PAD).any(-1)
    return values != MISSING_TIME if view.kind == "time" else ~values.isnan()


def _without(view: View, values: Tensor, at: Tensor) -> Tensor:
    """The values with those `at` missing."""
    if view.kind == "category":
        return values.masked_fill(at[..., None], PAD)
    return values.masked_fill(at, int(MISSING_TIME) if view.kind == "time" else torch.nan)


def _some(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:ALIGNED].to(rows.device)]
