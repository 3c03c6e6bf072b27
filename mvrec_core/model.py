"""The model, top to bottom: views -> fused steps -> causal encoder -> a user's vector; item views -> an item's vector.

Shapes: B users, L steps, T = L + 1 outputs, N catalogue rows, n of them needed now, K views, D dimensions, P targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core import graph, losses
from mvrec_core.batch import Batch
from mvrec_core.calibration import Scaling
from mvrec_core.catalog import FIRST, PAD, Catalog
from mvrec_core.config import Config
from mvrec_core.encoders import (
    CategoryEncoder,
    Encoders,
    GapEncoder,
    IdEncoder,
    NumberEncoder,
    TimeEncoder,
    VectorEncoder,
)
from mvrec_core.errors import ConfigError
from mvrec_core.features import MISSING_TIME, Fitted, item_features
from mvrec_core.fusion import GatedFusion, LinearFusion
from mvrec_core.past import Past, same
from mvrec_core.repeats import Repeats
from mvrec_core.sequence_encoder import SequenceEncoder
from mvrec_core.text import Live, TextEncoder
from mvrec_core.views import GraphView
from mvrec_core.workers import ALONE, Workers

HIDDEN = 0.1  # share of the users to whom training does not tell when the next event happens
MOST_DRAWN = 1 << 24  # rows that torch.multinomial draws from
ROWS_GRAIN = 256  # rows of items or targets come in multiples of it, for few shapes, as in batch.rounded


@dataclass(frozen=True)
class ItemViews:
    """The item-level views of n items: z [n, K, D] and present bool [n, K]."""

    z: Tensor
    present: Tensor

    def __getitem__(self, rows: Tensor | slice) -> ItemViews:
        return ItemViews(self.z[rows], self.present[rows])


class MVRec(nn.Module):
    popularity: Tensor  # [N]: train events
    weight_of: Tensor  # [values of the view train.weights names]: what a target counts
    known: Tensor  # bool [N]: items of train events, the only ones whose id says something
    certainty: Tensor  # the share of a score that the others' counts, see calibration.Scaling
    fusion: GatedFusion | LinearFusion
    bias: nn.Parameter

    def __init__(self, config: Config, catalog: Catalog, fitted: Fitted, popularity: Tensor):
        """popularity [N]: train events of each catalogue row. Raises ConfigError."""
        super().__init__()
        by_popularity = config.train.loss == "sampled_softmax" and config.train.negatives_from == "popularity"
        if by_popularity and len(popularity) > MOST_DRAWN:
            raise ConfigError(
                f"train.negatives_from: 'popularity' draws from at most {MOST_DRAWN:,} rows, "
                f"found {len(popularity):,}; take uniform or batch"
            )
        self.config = config
        dim = config.model.dim
        self.item_view_names = list(config.views_at("item"))
        self.event_view_names = list(config.views_at("event"))
        self.user_view_names = list(config.views_at("user"))
        self.text: TextEncoder | None = None
        self.until: GapEncoder | None = None
        self.repeats: Repeats | None = None
        self.encoders = Encoders()
        linear = config.model.fusion == "linear"
        for name, view in (config.views_at("item") if linear else config.views).items():
            if view.kind == "id":
                self.encoders[name] = IdEncoder(FIRST + len(catalog), dim)
            elif view.kind == "category":
                self.encoders[name] = CategoryEncoder(len(fitted.vocabularies[name]), dim)
            elif view.kind == "number":
                self.encoders[name] = NumberEncoder(dim)
            elif view.kind == "vector":
                size = len(fitted.vectors[name][0])
                self.encoders[name] = VectorEncoder(size, dim, config.model.view_dropout)
            elif view.kind == "graph":  # its own company, and with a text view that of items of a like text
                width = view.size * (1 if config.text_view is None else 2)
                self.encoders[name] = VectorEncoder(width, dim, config.model.view_dropout)
                nothing = torch.full((FIRST + len(catalog), width), torch.nan)
                self.register_buffer(f"feature_{name}", nothing)  # kept: new_model makes it of events
            elif view.kind == "time":
                self.encoders[name] = TimeEncoder(dim)
            elif view.kind == "text":
                self.text = TextEncoder(config.model.text, catalog.table[name].to_pylist())
                self.encoders[name] = nn.Linear(self.text.hidden, dim)
        for name, values in item_features(config, catalog.table, fitted).items():
            self.register_buffer(f"feature_{name}", values, persistent=False)
        kinds = [config.views[name].kind for name in self.item_view_names]
        believed_whole = linear or "id" not in kinds  # the source formulation has no certainty
        self._id = None if believed_whole else kinds.index("id")
        self.register_buffer("certainty", torch.tensor(1.0))
        self.register_buffer("popularity", popularity.float(), persistent=False)
        self.register_buffer("known", (popularity > 0) & (torch.arange(len(popularity)) >= FIRST))
        if config.train.weights is not None:
            vocabulary, weights = fitted.vocabularies[config.train.weights.view], config.train.weights.values
            row = vocabulary.index(list(weights))
            if (row < FIRST).any():
                strange = next(value for value, r in zip(weights, row, strict=True) if r < FIRST)
                there = ", ".join(vocabulary.values.to_pylist()[:10])
                raise ConfigError(f"train.weights.values: expected values of train events ({there}), found '{strange}'")
            weight_of = torch.ones(len(vocabulary))
            weight_of[torch.from_numpy(row)] = torch.tensor(list(weights.values()))
            self.register_buffer("weight_of", weight_of, persistent=False)
        if linear:
            self.fusion = LinearFusion(len(self.item_view_names), dim)
        else:
            self.fusion = GatedFusion(len(self.item_view_names) + len(self.event_view_names), dim)
            self.user_fusion = GatedFusion(max(1, len(self.user_view_names)), dim)
            self.sequence = SequenceEncoder(config.model)
            if any(view.kind == "time" for view in config.views.values()):
                self.until = GapEncoder(dim)
            self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
            if not config.evaluate.exclude_seen:
                self.repeats = Repeats(dim, self.until is not None)
        self.log_tau = nn.Parameter(torch.tensor(config.model.temperature).log())
        self.bias = nn.Parameter(
            torch.tensor(-math.log(len(catalog) + 1))
        )  # near where it ends: an item is rarely next

    @property
    def tau(self) -> Tensor:
        return self.log_tau.exp()

    @torch.no_grad()
    def rescale(self, scaling: Scaling) -> None:
        """By other tau, b and certainty; where items are lifted (repeats.py) a has to be 1."""
        self.bias.mul_(scaling.a).add_(scaling.c)
        self.log_tau.sub_(math.log(scaling.a))
        self.certainty.mul_(scaling.certainty)

    @contextmanager
    def as_if_new(self, items: Tensor) -> Iterator[None]:
        """For a while these rows, int64 [n], are as new items are in a model that is complete."""
        kept = {
            name: getattr(self, name)[items].clone() for name in ("known", *map("feature_{}".format, self._graphs()))
        }
        self.known[items] = False
        for name, view in self._graphs().items():
            company = getattr(self, f"feature_{name}")
            company[items, : view.size] = company[items, view.size :] if self.text is not None else torch.nan
        try:
            yield
        finally:
            for name, values in kept.items():
                getattr(self, name)[items] = values

    @property
    def n_rows(self) -> int:
        return len(self.popularity)

    @torch.no_grad()
    def refresh_texts(self, workers: Workers = ALONE) -> None:
        """Encodes every text anew, and finds the company that items of a like text keep. All workers
        have to call it."""
        if self.text is None:
            return
        self.text.refresh(workers)
        row = torch.arange(self.n_rows, device=self.popularity.device)
        vector, there = self.text(row)
        for name, view in self._graphs().items():
            company = getattr(self, f"feature_{name}")
            company[:, view.size :] = torch.nan
            company[there, view.size :] = self._alike(name, view, vector[there], row[there])

    def complete(self) -> None:
        """Of a trained model: what has no company of its own takes that of items of a like text for it."""
        for name, view in self._graphs().items() if self.text is not None else ():
            company = getattr(self, f"feature_{name}")
            alone = company[:, 0].isnan()
            company[alone, : view.size] = company[alone, view.size :]

    def _graphs(self) -> dict[str, GraphView]:
        views = self.config.views_at("item").items()
        return {name: view for name, view in views if isinstance(view, GraphView)}

    def _alike(self, name: str, view: GraphView, text_nH: Tensor, row_n: Tensor | None = None) -> Tensor:
        """[n, view.size]: graph.alike of some texts, in the catalogue or not, among the catalogue's known items."""
        company = getattr(self, f"feature_{name}")[:, : view.size]
        places = (self.known & ~company[:, 0].isnan()).nonzero()[:, 0]
        vector, there = self.text(places)  # type: ignore[misc]
        return graph.alike(company[places[there]], vector[there], places[there], text_nH, row_n)

    # items

    def item_views(self, item: Tensor, live: Live | None = None) -> ItemViews:
        """int64 [n] catalogue rows -> their item-level views; `live` as in TextEncoder.forward."""
        encoded = []
        for name in self.item_view_names:
            view = self.config.views[name]
            if view.kind == "id":
                z, present = self.encoders[name](item)
                encoded.append((z, present & self.known[item]))
            elif view.kind == "text":
                vector, present = self.text(item, live)  # type: ignore[misc]
                encoded.append((self._project(name, vector), present))
            else:
                encoded.append(self.encoders[name](getattr(self, f"feature_{name}")[item]))
        return _stack(encoded)

    def _project(self, name: str, vector: Tensor) -> Tensor:
        """A text's vector [n, H] -> z [n, D]. In training some of the H are left out, the same for all items of a step:
        as good as a choice for each item, and nearly free."""
        layer = self.encoders[name]
        kept = F.dropout(vector.new_ones(vector.shape[1]), self.config.model.view_dropout, self.training)
        return F.linear(vector, layer.weight * kept, layer.bias)  # type: ignore[operator, arg-type]

    def new_item_views(self, features: Mapping[str, Tensor], texts: Sequence[str | None]) -> ItemViews:
        """The views of n items that are not in the catalogue, from item_features and their texts."""
        encoded = []
        device = self.popularity.device
        if self.text is not None:
            vector = self.text.embed([text or "" for text in texts])
            there = torch.tensor([bool(text) for text in texts], device=device)
        for name in self.item_view_names:
            view = self.config.views[name]
            if view.kind == "id":
                encoded.append(self.encoders[name](torch.zeros(len(texts), dtype=torch.int64, device=device)))
            elif view.kind == "graph":
                company = torch.full((len(texts), getattr(self, f"feature_{name}").shape[1]), torch.nan, device=device)
                if self.text is not None and bool(there.any()):
                    company[there] = self._alike(name, view, vector[there]).repeat(1, 2)
                encoded.append(self.encoders[name](company))
            elif view.kind == "text":
                encoded.append((self.encoders[name](vector * there[:, None]), there))
            else:
                encoded.append(self.encoders[name](features[name].to(device)))
        return _stack(encoded)

    def item_vectors(self, views: ItemViews) -> tuple[Tensor, Tensor]:
        """Vectors [n, D] and view weights [n, K]. A vector has length 1, but for that of an item whose id says nothing,
        `certainty`, and of one with no view at all, 0."""
        if isinstance(self.fusion, LinearFusion):
            vector, weight = self.fusion(views.z, views.present), views.present.float()
        else:
            vector, weight, _ = self._fused_items(views)
        return self._sized(vector, None if self._id is None else views.present[..., self._id]), weight

    def _sized(self, vector: Tensor, by_id: Tensor | None) -> Tensor:
        vector = F.normalize(vector.float(), dim=-1)
        if by_id is not None:
            vector = torch.where(by_id[..., None], vector, vector * self.certainty)
        return vector

    def _fused_items(self, views: ItemViews) -> tuple[Tensor, Tensor, Tensor]:
        return self.fusion(views.z, views.present, slice(len(self.item_view_names)))

    # users

    def last_vectors(self, batch: Batch, views: ItemViews, row: Tensor) -> Tensor:
        """Unit vectors [B, D] after the last step of each; the rest as in user_vectors, for less work."""
        if isinstance(self.fusion, LinearFusion):
            return self.user_vectors(batch, views, row)[torch.arange(len(row), device=row.device), batch.length]
        item_nD, _, mass_n = self._fused_items(views)
        return F.normalize(self.sequence(self._steps(batch, item_nD, mass_n, row), batch.length).float(), dim=-1)

    def user_vectors(self, batch: Batch, views: ItemViews, row: Tensor) -> Tensor:
        """Unit vectors [B, T, D] after each step. `views` of the batch's items, row [B, L] where each step's is."""
        if isinstance(self.fusion, LinearFusion):
            return self._linear_users(views.z[row], views.present[row])
        item_nD, _, mass_n = self._fused_items(views)
        return self._users(batch, item_nD, mass_n, row)

    def _users(self, batch: Batch, item_nD: Tensor, mass_n: Tensor, row: Tensor) -> Tensor:
        return F.normalize(self.sequence(self._steps(batch, item_nD, mass_n, row)).float(), dim=-1)

    def _steps(self, batch: Batch, item_nD: Tensor, mass_n: Tensor, row: Tensor) -> Tensor:
        """h [B, T, D]: what is known before any event, then the fused steps. item_nD, mass_n: items' fused views."""
        step_BLD, mass_BL = F.embedding(row, item_nD), F.embedding(row, mass_n[:, None]).squeeze(-1)
        if self.event_view_names:
            events = _stack([self._event_view(name, batch) for name in self.event_view_names])
            kept = slice(len(self.item_view_names), None)
            step_BLD, _, _ = self.fusion(events.z, events.present, kept, before=(step_BLD, mass_BL))
        first_B1D = self._profile(batch)[:, None].to(step_BLD.dtype)
        h_BTD = torch.cat([first_B1D, step_BLD], 1)
        if self.until is not None:
            h_BTD = h_BTD + self.until(F.pad(batch.time, (1, 0), value=MISSING_TIME), batch.now)
        return h_BTD

    def step_weights(self, batch: Batch, views: ItemViews, row: Tensor) -> Tensor:
        """W_t [B, L, K] of the item-level views and, but for linear fusion, the event-level views behind them; all zero
        where there is no step. `views` and `row` as in user_vectors."""
        z, present = views.z[row], views.present[row]
        if isinstance(self.fusion, LinearFusion):
            return self.item_vectors(ItemViews(z, present))[1]
        events = [self._event_view(name, batch) for name in self.event_view_names]
        z = torch.cat([z, *(vector[..., None, :].float() for vector, _ in events)], -2)
        present = torch.cat([present, *(there[..., None] for _, there in events)], -1)
        return self.fusion(z, present)[1]

    def _event_view(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        z, present = self.encoders[name](batch.event[name])
        return z, present & (batch.item != PAD)

    def _profile(self, batch: Batch) -> Tensor:
        """[B, D]: what is known before any event."""
        if not self.user_view_names:
            return (
                self.start + 0.0 * self.user_fusion.A.sum() + torch.zeros(len(batch.item), 1, device=self.start.device)
            )
        views = _stack([self.encoders[name](batch.user[name]) for name in self.user_view_names])
        return self.start + self.user_fusion(views.z, views.present)[0]

    def _linear_users(self, item_z: Tensor, item_present: Tensor) -> Tensor:
        """x_i of the source formulation after each step: the mean of view i over the steps so far."""
        there = item_present.unsqueeze(-1)
        total, count = (item_z * there).cumsum(1), there.cumsum(1)
        mean = F.pad(total / count.clamp(min=1), (0, 0, 0, 0, 1, 0))
        return F.normalize(self.fusion(mean, F.pad(count[..., 0] > 0, (0, 0, 1, 0))).float(), dim=-1)

    # training

    def forward(self, batch: Batch, generator: torch.Generator, workers: Workers = ALONE) -> Tensor:
        """The loss of a batch, a scalar: the mean over its targets.

        workers: where they gather and all need the whole catalogue, each makes the vectors of a part of it. Not of
        texts that are read with gradient: each reads those of its own batch.
        """
        settings = self.config.train
        batch = self._untold(batch)
        wanted = batch.target >= FIRST
        target_P = batch.target[wanted]
        weight_P = self._weights(batch.kind[wanted])
        sampled = self._negatives(target_P, batch.others, generator)
        everything = settings.loss == "softmax"
        touched = torch.cat([batch.item.flatten(), target_P])
        known = self.known.nonzero()[:, 0]
        needed = (
            torch.arange(self.n_rows, device=touched.device) if everything else torch.cat([touched, sampled]).unique()
        )
        live = None
        if self.text is not None and self.text.tuned:
            live = self.text.choose_live(touched, needed, generator)
        gather = workers.gather if everything and live is None and isinstance(self.fusion, GatedFusion) else None
        grain = ROWS_GRAIN if gather is None else math.lcm(ROWS_GRAIN, workers.size)
        needed = F.pad(needed, (0, -len(needed) % grain), value=PAD)  # few shapes, as in batch.rounded
        place = torch.zeros(self.n_rows, dtype=torch.int64, device=needed.device)
        place[needed] = torch.arange(len(needed), device=needed.device)
        if gather is not None:
            item_mD, _, mass_m = self._fused_items(self.item_views(needed.view(workers.size, -1)[workers.rank]))
            gathered = gather(torch.cat([item_mD, mass_m[:, None]], 1))
            item_nD, mass_n = gathered[:, :-1], gathered[:, -1]
            items_nD = self._sized(item_nD, None if self._id is None else self.known[needed])
            users_BTD = self._users(batch, item_nD, mass_n, place[batch.item])
        else:
            views = self.item_views(needed, live)
            items_nD, _ = self.item_vectors(views)
            users_BTD = self.user_vectors(batch, views, place[batch.item])
        users_PD = users_BTD.flatten(0, 1).index_select(0, wanted.flatten().nonzero()[:, 0])
        past = Past.of(batch, wanted, self.known)
        mass_BTL = None
        if self.repeats is not None:
            mass_BTL = self.repeats(batch, F.embedding(place[batch.item], items_nD))
        if everything:
            among = torch.zeros_like(place)
            among[known] = torch.arange(len(known), device=known.device)
            items_CD, target_P = items_nD.index_select(0, known), among[target_P]
            seen_PL = torch.where(past.there_PL, among[past.item_PL], target_P[:, None])
            return losses.softmax(
                users_PD,
                items_CD,
                target_P,
                self.tau,
                self.bias,
                weight_P,
                settings.label_smoothing,
                seen_PL,
                None if mass_BTL is None else mass_BTL[wanted] * past.there_PL,
            )
        positive_P = (users_PD * items_nD[place[target_P]]).sum(-1)
        if settings.loss == "bce":
            negative_P = (users_PD * items_nD[place[sampled]]).sum(-1)
            return losses.bce(positive_P, negative_P, self.tau, self.bias, weight_P)
        more = -len(users_PD) % ROWS_GRAIN
        negative_PC = (F.pad(users_PD, (0, 0, 0, more)) @ items_nD[place[sampled]].T)[: len(users_PD)]
        if settings.loss == "gbce":
            return losses.gbce(
                positive_P,
                negative_PC,
                target_P,
                sampled,
                len(known),
                settings.calibration,
                self.tau,
                self.bias,
                weight_P,
            )
        share = self._drawn_by()
        log_q = (share / share.sum()).clamp(min=1e-12).log()
        more_P, again_PL = None, None
        if mass_BTL is not None:
            again_BTL = users_BTD @ F.embedding(place[batch.item], items_nD).mT / self.tau
            again_BTL = again_BTL + (mass_BTL @ same(batch.item).float()).log1p()
            there_PL = past.latest(batch.item) & (past.item_PL != target_P[:, None])
            again_PL = again_BTL[wanted].masked_fill(~there_PL, -torch.inf)
            more_P = (mass_BTL[wanted] * (past.item_PL == target_P[:, None])).sum(1).log1p()
        return losses.sampled_softmax(
            positive_P,
            negative_PC,
            target_P,
            sampled,
            log_q,
            self.tau,
            self.bias,
            weight_P,
            settings.label_smoothing,
            past.among(batch.item, sampled),
            more_P,
            again_PL,
        )

    def _untold(self, batch: Batch) -> Batch:
        """In training some users are not told when the next event happens, so that a request that does not say when it
        is asked has a vector of its own."""
        if not self.training:
            return batch
        hidden = torch.rand(len(batch.now), 1, device=batch.now.device) < HIDDEN
        return replace(batch, now=batch.now.masked_fill(hidden, int(MISSING_TIME)))

    def _weights(self, kind_PM: Tensor) -> Tensor | None:
        """[P]: what each target counts, by its categories; None where all count the same."""
        if self.config.train.weights is None:
            return None
        weight_PM = self.weight_of[kind_PM].masked_fill(kind_PM == PAD, 0.0)
        return torch.where(weight_PM.amax(1) > 0, weight_PM.amax(1), 1.0)

    def _drawn_by(self) -> Tensor:
        """[N]: what the negatives of sampled_softmax are drawn by, up to a factor."""
        how = self.config.train.negatives_from
        weight = torch.ones_like(self.popularity) if how == "uniform" else self.popularity.clone()
        weight = (weight + 1).sqrt() if how == "popularity" else weight
        return weight * self.known

    def _negatives(self, target_P: Tensor, others_Q: Tensor, generator: torch.Generator) -> Tensor:
        """Items of train events to score against, shared by the batch; of bce one a target."""
        settings = self.config.train
        device = self.popularity.device
        if settings.loss == "softmax":
            return torch.zeros(0, dtype=torch.int64, device=device)
        if settings.loss == "sampled_softmax" and settings.negatives_from == "batch":
            targets = torch.cat([target_P, others_Q[others_Q >= FIRST]])
            return targets[torch.randint(len(targets), (settings.negatives,), generator=generator).to(device)]
        if settings.loss == "sampled_softmax" and settings.negatives_from == "popularity":
            drawn = torch.multinomial(self._drawn_by().cpu(), settings.negatives, replacement=True, generator=generator)
            return drawn.to(device)
        count = len(target_P) if settings.loss == "bce" else settings.negatives
        known = self.known.nonzero()[:, 0]
        return known[torch.randint(len(known), (count,), generator=generator).to(device)]


def _stack(encoded: Sequence[tuple[Tensor, Tensor]]) -> ItemViews:
    return ItemViews(torch.stack([z.float() for z, _ in encoded], -2), torch.stack([p for _, p in encoded], -1))
