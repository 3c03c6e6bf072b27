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

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mvrec_core import checkpoint
from mvrec_core.batch import collate
from mvrec_core.batches import epoch_batches
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import ConfigError, DataError
from mvrec_core.learner import make_optimiser, rate
from mvrec_core.masked_tokens import MaskedTokens
from mvrec_core.model import MVRec
from mvrec_core.pretext import Pretext
from mvrec_core.pretrained import reading, save
from mvrec_core.sequences import VALID, Examples, Histories, train_examples
from mvrec_core.shards import Shards
from mvrec_core.text import TextEncoder
from mvrec_core.training import autocast
from mvrec_core.workers import Workers

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
            model.text.keep_frozen(workers)
            model.refresh_texts(workers)
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
                model.refresh_texts(workers)
        means = {
            name: float(s / n) for name, s, n in zip(pretext.parts, *total.unbind(), strict=True) if n
        }  # a part that never came up has no mean
        last = number == config.pretrain.epochs
        yield Epoch("views", number, config.pretrain.epochs, means, time.perf_counter() - began, last)


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
