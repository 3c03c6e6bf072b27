"""Self-supervised pretraining: what a model can learn from the views before it is asked what comes next.

1. Masked tokens of the catalogue's texts bring the text encoder nearer to the domain (optional).
2. Masked views: at some steps one view is hidden and has to be told from the step's others and what came before.
3. Aligned views: an item's text against its id, and against the text of what follows it in a history.

Shapes: B users, L steps, T = L + 1 outputs, K views of a step, n distinct items of the batch, D dimensions, P hidden
values or pairs, C candidates, X distinct texts, I tokens, V words or values of a vocabulary, M values of a category.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mvrec_core import checkpoint
from mvrec_core.batch import Batch, collate
from mvrec_core.batches import epoch_batches
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config, View
from mvrec_core.encoders import calendar
from mvrec_core.errors import ConfigError, DataError
from mvrec_core.features import MISSING_TIME
from mvrec_core.learner import make_optimiser, rate
from mvrec_core.masked_tokens import MaskedTokens
from mvrec_core.model import ItemViews, MVRec
from mvrec_core.pretrained import reading, save
from mvrec_core.sequences import VALID, Examples, Histories, train_examples
from mvrec_core.shards import Shards
from mvrec_core.text import TextEncoder
from mvrec_core.training import autocast
from mvrec_core.workers import Workers

HIDDEN = 0.3  # share of the steps at which a view is hidden, and of the users of whom one is
TEMPERATURE = 0.1  # of all contrasts
ALIGNED = 1024  # items or pairs of a step that are aligned
TEXT_EPOCHS = 3  # where the text encoder is tuned and pretrain.text_epochs says nothing


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: the mean loss of each part over its steps; the same on every worker."""

    phase: str  # "text" or "views"
    number: int  # from 1
    of: int
    losses: dict[str, float]
    seconds: float
    last: bool  # of the whole pretraining


def pretrain(config: Config, data: Data, workers: Workers, directory: Path) -> Iterator[Epoch]:
    """Yields after each epoch. Before the last one is yielded, the first worker has written `directory`:

    model.safetensors   every trained weight but the text encoder's
    text_encoder/       where it was adapted or is tuned
    views.json          what each view reads, for the check in `load`
    losses.json         {"text": [{part: loss} an epoch], "views": [...]}
    config.json         the run's configuration
    manifest.json       format, version, sha256 of each file

    Only train events are read. The same seed gives the same bits on CPU.
    Raises ConfigError for `fusion: linear`, which has no fused state, and DataError where there are too few windows.
    """
    check(config)
    histories = data.histories(config).before(VALID)
    losses: dict[str, list[dict[str, float]]] = {"text": [], "views": []}
    with tempfile.TemporaryDirectory() as folder:
        base = config
        epochs = text_epochs(config)
        if epochs:
            for epoch in adapt_text(config, data, workers, epochs, Path(folder) / "text_encoder"):
                losses["text"].append(epoch.losses)
                yield epoch
            base = reading(config, Path(folder) / "text_encoder")
        model = checkpoint.new_model(base, data, Shards.whole(histories))
        for epoch in fit(model, histories, config, workers):
            losses["views"].append(epoch.losses)
            if epoch.last and workers.rank == 0:
                save(directory, config, data, model, losses, with_text=epochs > 0)
            yield epoch


def check(config: Config) -> None:
    """Raises ConfigError where there is no fused state to pretrain."""
    if config.model.fusion == "linear":
        raise ConfigError("model.fusion: pretraining needs 'gated', found 'linear', which has no fused state")


def text_epochs(config: Config) -> int:
    """Epochs of masked tokens: none without a text view, and by default none for an encoder that stays frozen."""
    if config.text_view is None:
        return 0
    default = 0 if config.model.text.tune == "frozen" else TEXT_EPOCHS
    return default if config.pretrain.text_epochs is None else config.pretrain.text_epochs


# masked and aligned views


def fit(model: MVRec, histories: Histories, config: Config, workers: Workers) -> Iterator[Epoch]:
    """Trains the model in place and yields after each epoch. Every event of `histories` is read, none is held out.

    Raises DataError where there are fewer windows than workers.
    """
    model.to(workers.device)
    examples = _windows(histories, config.model.max_len)
    _check_shares(len(examples), "histories", config, workers)
    pretext = Pretext(model).to(workers.device)
    optimiser = make_optimiser(model, config)
    optimiser.add_param_group({"params": list(pretext.guess.parameters()), "lr": config.train.lr})
    parallel, learner = workers.wrap(pretext), _Learner(optimiser, len(examples), config.pretrain.epochs, config)
    generator = _seeded(config, workers)
    if model.text is not None:
        with autocast(config, workers.device):
            model.refresh_texts()
    for number in range(1, config.pretrain.epochs + 1):
        began = time.perf_counter()
        model.train()
        total = torch.zeros(2, len(pretext.parts), dtype=torch.float64)
        examples = _windows(histories, config.model.max_len, np.random.default_rng([config.seed, number]))
        for rows in epoch_batches(examples, config.train.batch_size, [config.seed, number], workers):
            batch = collate(histories, examples[rows.mine]).to(workers.device)
            with autocast(config, workers.device):
                loss, parts, there = parallel(batch, generator)
            learner.step(loss * rows.share(examples, rows.mine), pretext)
            total += torch.stack([parts * there, there]).double().cpu()
        total = workers.add(total)
        if model.text is not None and model.text.tuned and number % config.model.text.refresh_epochs == 0:
            with autocast(config, workers.device):
                model.refresh_texts()
        means = {
            name: float(s / n) for name, s, n in zip(pretext.parts, *total.unbind(), strict=True) if n
        }  # a part that never came up has no mean
        last = number == config.pretrain.epochs
        yield Epoch("views", number, config.pretrain.epochs, means, time.perf_counter() - began, last)


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
            live = model.text.choose_live(needed, generator)
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


def _windows(histories: Histories, max_len: int, draw: np.random.Generator | None = None) -> Examples:
    """Every event is read once, in windows of at most max_len."""
    examples = train_examples(histories, max_len, draw)
    return dataclasses.replace(examples, start=examples.first, stop=examples.limit)


# masked tokens


def adapt_text(config: Config, data: Data, workers: Workers, epochs: int, directory: Path) -> Iterator[Epoch]:
    """Trains the whole text encoder on the masked tokens of the catalogue's distinct texts, yields after each epoch,
    and saves it before the last is yielded. Raises ConfigError where its tokenizer has no mask."""
    name = config.text_view
    assert name is not None
    torch.manual_seed(config.seed)
    settings = config.model.text.model_copy(update={"tune": "full"})
    text = TextEncoder(settings, data.catalog.table[name].to_pylist())
    task = MaskedTokens(text).to(workers.device)
    size = text.size.cpu().numpy() if text.text_of.min() < len(text.cache) - 1 else np.zeros(0, np.int64)
    nothing = np.zeros_like(size)
    texts = Examples(np.arange(len(size)), nothing, size, nothing, size)  # a text for a window, tokens for events
    _check_shares(len(texts), f"texts of views.{name}", config, workers)
    heads = [*task.transform.parameters(), task.bias]
    optimiser = torch.optim.AdamW(
        [{"params": list(text.encoder.parameters()), "lr": settings.lr}, {"params": heads, "lr": config.train.lr}],
        weight_decay=config.train.weight_decay,
    )
    parallel, learner = workers.wrap(task), _Learner(optimiser, len(texts), epochs, config)
    generator = _seeded(config, workers)
    for number in range(1, epochs + 1):
        began = time.perf_counter()
        task.train()
        total = torch.zeros(2, dtype=torch.float64)
        for rows in epoch_batches(texts, config.train.batch_size, [config.seed, number], workers):
            with autocast(config, workers.device):
                loss = parallel(torch.from_numpy(rows.mine).to(workers.device), generator)
            learner.step(loss * rows.share(texts, rows.mine), task)
            total += torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)
        total = workers.add(total)
        if number == epochs:
            _write_encoder(text, directory)
        losses = {"masked tokens": float(total[0] / total[1])}
        yield Epoch("text", number, epochs, losses, time.perf_counter() - began, last=False)


def _write_encoder(text: TextEncoder, directory: Path) -> None:
    """On every worker, each its own: transformers' save_pretrained writes on the first alone."""
    directory.mkdir()
    text.encoder.config.save_pretrained(directory)
    text.tokenizer.save_pretrained(directory)
    weights = {name: value.detach().cpu().contiguous() for name, value in text.encoder.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# what both need


class _Learner:
    """An optimiser step with clipped gradients at a rate that rises, then falls."""

    def __init__(self, optimiser: torch.optim.Optimizer, n_examples: int, epochs: int, config: Config):
        steps = epochs * math.ceil(n_examples / config.train.batch_size)
        self.optimiser = optimiser
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))

    def step(self, loss: Tensor, module: nn.Module) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()


def _seeded(config: Config, workers: Workers) -> torch.Generator:
    torch.manual_seed(config.seed * 1000 + workers.rank)
    return torch.Generator().manual_seed(config.seed * 1000 + workers.rank)


def _check_shares(count: int, what: str, config: Config, workers: Workers) -> None:
    if count < workers.size or config.train.batch_size < workers.size:
        raise DataError(
            f"{workers.size} workers need as many {what} and a batch_size as large, "
            f"found {count} and train.batch_size {config.train.batch_size}"
        )
