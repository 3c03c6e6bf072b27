"""The optimiser, one step, one epoch, evaluation: plain torch, on one worker or several."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core.batch import collate
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.features import MISSING_TIME
from mvrec_core.metrics import RankingSums, Ranks, ranks
from mvrec_core.model import GRAIN, ROWS_GRAIN, ItemViews, MVRec
from mvrec_core.policy import Filter, eligible
from mvrec_core.sequences import TEST, VALID, Examples, Histories, stage_examples, train_examples

WARMUP = 0.05  # share of the steps over which the learning rate rises
SCALAR_RATE = 10.0  # tau and b have further to go than a weight of a matrix
CHOSEN_BY = "NDCG@10"


@dataclass(frozen=True)
class Workers:
    """This worker among the others; by default there is just one.

    wrap: makes a model synchronise its gradients; add: sums a tensor over all workers
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave. valid is None where the epoch was not validated; the same on every worker."""

    number: int  # from 1
    of: int  # epochs at most
    refit: bool
    loss: float
    seconds: float
    targets: int
    valid: RankingSums | None
    best: bool  # the best validation so far
    last: bool


def fit(
    model: MVRec, histories: Histories, config: Config, workers: Workers, refit: int | None = None
) -> Iterator[Epoch]:
    """Trains in place and yields after each epoch; ends by itself when validation has stopped improving.

    refit: train on validation events too, for so many epochs and without looking at validation

    Raises DataError when there are fewer training windows than workers.
    """
    settings = config.train
    epochs, before = (settings.epochs, VALID) if refit is None else (refit, TEST)
    model.to(workers.device)
    examples = train_examples(histories, config.model.max_len, before=before)
    if len(examples) < workers.size or settings.batch_size < workers.size:
        raise DataError(
            f"{workers.size} workers need as many training windows and a batch_size as large, "
            f"found {len(examples)} windows and train.batch_size {settings.batch_size}"
        )
    valid = stage_examples(histories, "valid", config.model.max_len)
    optimiser = make_optimiser(model, config)
    steps = epochs * math.ceil(len(examples) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    generator = torch.Generator().manual_seed(config.seed * 1000 + workers.rank)
    torch.manual_seed(config.seed * 1000 + workers.rank)
    if model.text is not None:
        model.text.attach(optimiser, steps)
        with autocast(config, workers.device):
            model.text.refresh()
    kind = settings.weights.view if settings.weights is not None else None
    parallel = workers.wrap(model)
    average = Average(model, settings.averaging)
    best, stale = -1.0, 0
    for number in range(1, epochs + 1):
        began = time.perf_counter()
        model.train()
        total = torch.zeros(2, dtype=torch.float64)
        examples = train_examples(histories, config.model.max_len, np.random.default_rng([config.seed, number]), before)
        for mine, share in epoch_batches(examples, settings.batch_size, config.seed, number, workers):
            batch = collate(histories, examples[mine], GRAIN, kind).to(workers.device)
            with autocast(config, workers.device):
                loss = parallel(batch, generator) * share
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update()
            count = int((batch.target >= FIRST).sum())
            total += torch.tensor([float(loss.detach()) / share * count, count], dtype=torch.float64)
        total = workers.add(total)
        average.swap()
        if model.text is not None and model.text.tuned and number % config.model.text.refresh_epochs == 0:
            with autocast(config, workers.device):
                model.text.refresh()
        sums, is_best = None, False
        if refit is None and (number % settings.validate_every == 0 or number == epochs):
            ranked = rank_targets(model, histories, valid[workers.rank :: workers.size], config)
            sums = RankingSums.from_vector(workers.add(RankingSums.from_ranks(ranked).as_vector()))
            score = sums.means().get(CHOSEN_BY, 0.0)
            is_best = score > best
            best, stale = (score, 0) if is_best else (best, stale + settings.validate_every)
        last = number == epochs or stale >= settings.patience
        seconds = time.perf_counter() - began
        loss, targets = float(total[0] / total[1]), int(total[1])
        yield Epoch(number, epochs, refit is not None, loss, seconds, targets, sums, is_best, last)
        if last:
            return
        average.swap()


class Average:
    """The exponential moving average of a model's trained weights: what is validated and kept."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.held = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """After a step; the first steps weigh less, so that the start is soon forgotten."""
        self.steps += 1
        torch._foreach_lerp_(self.held, self.live, 1 - min(self.decay, self.steps / (self.steps + 10)))

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the model, or the trained weights back."""
        for live, held in zip(self.live, self.held, strict=True):
            kept = live.clone()
            live.copy_(held)
            held.copy_(kept)


def make_optimiser(model: MVRec, config: Config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019): the text encoder at its own rate, and no decay of vectors and scalars."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.model.text.lr if name.startswith("text.") else config.train.lr
            rate *= SCALAR_RATE if parameter.ndim == 0 else 1.0
            decay = config.train.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
        betas=(0.9, 0.98),
    )


def rate(step: int, steps: int) -> float:
    warmup = max(1, int(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))  # steps is an estimate: windows differ by epoch
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def epoch_batches(
    examples: Examples, batch_size: int, seed: int, epoch: int, workers: Workers
) -> Iterator[tuple[np.ndarray, float]]:
    """This worker's rows of each batch of an epoch, and the weight that its mean loss needs so that the gradients'
    average over workers is that of the whole batch. Windows of a like length stand together, so padding is little;
    every worker gets the same number of batches, and each window comes once an epoch."""
    draw = np.random.default_rng([seed, epoch])
    length = examples.limit - examples.start
    order = np.argsort(length * draw.uniform(0.9, 1.1, len(length)), kind="stable")
    count = min(math.ceil(len(order) / batch_size), len(order) // workers.size)  # no worker goes without a window
    batches = np.array_split(order, count)
    targets = examples.limit - examples.first
    for place in draw.permutation(len(batches)):
        rows = batches[place]
        mine = rows[workers.rank :: workers.size]
        yield mine, float(targets[mine].sum() * workers.size / targets[rows].sum())


def autocast(config: Config, device: str) -> contextlib.AbstractContextManager[None]:
    """bf16 where the processor has it (or where the configuration insists), else full precision."""
    kind = torch.device(device).type
    wanted = config.train.precision
    able = torch.cuda.is_bf16_supported() if kind == "cuda" else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bf16" or (wanted == "auto" and able))


@torch.no_grad()
def catalogue(model: MVRec, chunk: int = 65536) -> tuple[ItemViews, Tensor]:
    """The item-level views of all N rows, and their unit vectors [N, D]; PAD and UNKNOWN are zero."""
    model.eval()
    rows = torch.arange(model.n_rows, device=model.popularity.device)
    parts = [model.item_views(part) for part in rows.split(chunk)]
    views = ItemViews(torch.cat([p.z for p in parts]), torch.cat([p.present for p in parts]))
    return views, model.item_vectors(views)[0]


@torch.no_grad()
def encode(model: MVRec, histories: Histories, examples: Examples, views: ItemViews, timed: bool = True) -> Tensor:
    """Users' unit vectors [B, D] after the last step of each example; with `timed` False nobody says when it is that
    the next event is asked for."""
    model.eval()
    batch = collate(histories, examples, GRAIN).to(model.popularity.device)
    if not timed:
        batch = replace(batch, now=torch.full_like(batch.now, int(MISSING_TIME)))
    needed, row = batch.item.unique(return_inverse=True)  # of a large catalogue a batch reads few items
    needed = F.pad(needed, (0, -len(needed) % ROWS_GRAIN), value=PAD)
    vectors_BTD = model.user_vectors(batch, views[needed], row)
    return vectors_BTD[torch.arange(len(examples), device=vectors_BTD.device), batch.length]


@torch.no_grad()
def rank_targets(model: MVRec, histories: Histories, examples: Examples, config: Config) -> Ranks:
    """Where the target of each example stands in the whole catalogue; seen items are left out if so configured."""
    views, items_ND = catalogue(model)
    parts = []
    for start in range(0, len(examples), config.evaluate.batch_size):
        part = examples[start : start + config.evaluate.batch_size]
        scores_BN = encode(model, histories, part, views) @ items_ND.T / model.tau + model.bias
        parts.append(rank_scores(scores_BN.float(), histories, part, config.evaluate.exclude_seen))
    return Ranks.concatenate(parts)


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
