"""Training, epoch by epoch, and the calibration of what was trained: plain torch, on one worker or several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvrec_core import sharding
from mvrec_core.batch import Batch, collate, rounded
from mvrec_core.batches import Rows, epoch_batches
from mvrec_core.calibration import STEEPNESS, CalibrationSums, Scaling
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.learner import SUMS, Learner, Progress, learnt, rate
from mvrec_core.metrics import RankingSums
from mvrec_core.model import MVRec
from mvrec_core.prefetch import ahead
from mvrec_core.ranking import pair_sums, rank_targets, view_weights
from mvrec_core.resume import States, Tensors
from mvrec_core.sequences import TEST, VALID, Examples, Histories, stage_examples, train_examples
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers

CHOSEN_BY = "NDCG@10"
NEW = 0.1  # share of the known items
CHOICE, REFIT = 1, 2  # what a draw is for


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
    step: int  # of the optimiser, since training began
    lr: float  # of the last step, for the model's matrices
    throughput: float  # targets a second in training, without validation
    padding: float  # share of the steps in the batches that were none
    gradient_norm: float  # mean over the steps, before clipping
    view_weights: dict[str, float] | None  # mean over the steps of some users; None where nobody has a validation event
    again: bool = False  # it was yielded before the run was stopped


def fit(
    model: MVRec,
    shards: Shards,
    config: Config,
    workers: Workers,
    refit: int | None = None,
    states: States | None = None,
) -> Iterator[Epoch]:
    """Trains in place and yields after each epoch; ends by itself when validation has stopped improving. With the last
    epoch the model is the one to keep: the best of validation.

    refit: train on validation events too, for so many epochs and without looking at validation
    states: what to go on from, if anything is there, and where to keep more of it; epochs that are over are yielded
        again. On a CPU what comes out has the same bits as if it had never stopped

    Raises DataError when there are fewer training windows than workers.
    """
    settings = config.train
    epochs, before = (settings.epochs, VALID) if refit is None else (refit, TEST)
    shares = config.train.shard_text and workers.size > 1
    if model.text is not None and shares:
        model.text.shard(workers.device, workers.size)
        sharding.exempt(model)
    model.to(workers.device)
    windows = sum(len(train_examples(histories, config.model.max_len, before=before)) for histories in shards)
    if windows < workers.size or settings.batch_size < workers.size:
        raise _too_few(windows, config, workers)
    if model.text is not None and not shares:
        with autocast(config, workers.device):
            model.text.keep_frozen(workers)
    learner = Learner(model, config, epochs * max(1, windows // settings.batch_size))
    at, best = Progress(), Tensors()
    state = states.newest(workers) if states is not None else None
    if state is None or (model.text is not None and not model.text.tuned):
        with autocast(config, workers.device):
            model.refresh_texts(workers)
    if state is not None:
        at, best = learner.restore(state)
    if model.text is not None:
        model.text.attach(learner.optimiser, learner.steps, at.step)
    over = [_epoch(tree) for tree in at.epochs]
    yield from over
    if over and over[-1].last:
        return
    purpose = CHOICE if refit is None else REFIT
    parallel = workers.wrap(model)
    for number in range(at.epoch, epochs + 1):
        began, before_now = time.perf_counter(), at.sums[1]
        _train_epoch(learner, parallel, shards, workers, at, before, purpose, states, best)
        trained = time.perf_counter() - began
        learner.average.swap()
        if model.text is not None and model.text.tuned and number % config.model.text.refresh_epochs == 0:
            with autocast(config, workers.device):
                model.refresh_texts(workers)
        sums, is_best = None, False
        if refit is None and (number % settings.validate_every == 0 or number == epochs):
            sums = _validate(model, shards, config, workers)
            score = sums.means().get(CHOSEN_BY, 0.0)
            is_best = score > at.best
            at.best, at.stale = (score, 0) if is_best else (at.best, at.stale + settings.validate_every)
        if is_best:
            best = {name: value.clone() for name, value in learnt(model).items()}
        last = number == epochs or at.stale >= settings.patience
        seconds = time.perf_counter() - began
        loss, targets, empty, places, norm, count = at.sums
        epoch = Epoch(
            number=number,
            of=epochs,
            refit=refit is not None,
            loss=loss / targets,
            seconds=seconds,
            targets=int(targets),
            valid=sums,
            best=is_best,
            last=last,
            step=at.step,
            lr=settings.lr * rate(at.step - 1, learner.steps),
            throughput=(targets - before_now) / trained,
            padding=empty / max(1.0, places),
            gradient_norm=norm / count,
            view_weights=view_weights(model, next(iter(shards)), config),
        )
        if not last:
            learner.average.swap()
        elif refit is None:
            model.load_state_dict(best, strict=False)
        if last:
            model.complete()
        at.epoch, at.shard, at.batch, at.sums = number + 1, 0, 0, [0.0] * len(SUMS)
        at.epochs.append(_values(epoch))
        if states is not None:
            states.save(at.step, learner.state(at, {} if last else best, workers), workers)
        yield epoch
        if last:
            return


def _train_epoch(
    learner: Learner,
    parallel: nn.Module,
    shards: Shards,
    workers: Workers,
    at: Progress,
    before: int,
    purpose: int,
    states: States | None,
    best: Tensors,
) -> None:
    """From where training stands to the end of its epoch."""
    model, config, settings = learner.model, learner.config, learner.config.train
    model.train()
    on_gpu = torch.device(workers.device).type == "cuda"  # a CPU that trains has no time to spare for the next batch
    generator = torch.Generator()
    total = torch.tensor(at.sums, dtype=torch.float64, device=workers.device)
    if workers.rank > 0:
        total.zero_()
    order = shards.order(np.random.default_rng([config.seed, purpose, at.epoch]))
    for shard in range(at.shard, len(order)):
        histories = shards.read(order[shard])
        seed = [config.seed, purpose, at.epoch, shard]
        examples = train_examples(histories, config.model.max_len, np.random.default_rng([*seed, 0]), before)
        if len(examples) < workers.size:
            raise _too_few(len(examples), config, workers)
        batches = epoch_batches(examples, settings.batch_size, [*seed, 1], workers)
        done = at.batch if shard == at.shard else 0
        # Each shard has a batch of a size of its own, and each size kernels of its own: 10 MB a shard on a CPU.
        size = partial(rounded, octave=1) if len(order) > 1 else int
        read = _read(histories, examples, batches[done:], config, on_gpu, size)
        for number, parts in enumerate(ahead(read) if on_gpu else read, done + 1):
            _seed([config.seed, purpose, at.step, workers.rank], generator)
            for place, (batch, share) in enumerate(parts):
                batch = batch.to(workers.device)
                with _synchronised(parallel, place == len(parts) - 1):
                    with autocast(config, workers.device):
                        loss = parallel(batch, generator, workers) * share
                    loss.backward()
                count = (batch.target >= FIRST).sum()
                empty = (batch.item == PAD).sum()
                total[0] += loss.detach().double() / share * count
                total[1:4] += torch.stack([count, empty, torch.full_like(empty, batch.item.numel())])
            total[4] += learner.step().double()
            total[5] += 1
            at.step += 1
            ends = number == len(batches) and shard == len(order) - 1  # then the epoch is kept with its validation
            if states is not None and not ends and at.step % settings.save_steps == 0:
                there = replace(at, shard=shard, batch=number, sums=workers.add(total.clone()).tolist())
                states.save(at.step, learner.state(there, best, workers), workers)
    at.sums = workers.add(total).tolist()


def _read(
    histories: Histories,
    examples: Examples,
    batches: Sequence[Rows],
    config: Config,
    pinned: bool,
    size: Callable[[int], int],
) -> Iterator[list[tuple[Batch, float]]]:
    """The parts of this worker's share of each batch, and what the mean loss of each counts.

    size: of so many windows, how many rows a part has; those behind them are empty
    """
    settings = config.train
    kind = settings.weights.view if settings.weights is not None else None
    in_batch = settings.loss == "sampled_softmax" and settings.negatives_from == "batch"
    for rows in batches:
        read = []
        parts = min(settings.accumulate, len(rows.all) // rows.workers)  # as many on every worker
        for part in np.array_split(rows.mine, parts):
            others = examples[np.setdiff1d(rows.all, part)] if in_batch else None
            batch = collate(histories, examples[part].padded(size(len(part))), kind, others)
            read.append((batch.pinned() if pinned else batch, rows.share(examples, part)))
        yield read


def _seed(seed: Sequence[int], generator: torch.Generator) -> None:
    """All of a step's randomness follows from where the step is, so no state of a generator has to be kept."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(number)
    generator.manual_seed(number)


def _synchronised(parallel: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Workers add up their gradients with the last part of a batch alone."""
    pause: Any = getattr(parallel, "no_sync", contextlib.nullcontext)
    return contextlib.nullcontext() if wanted else pause()


def _validate(model: MVRec, shards: Shards, config: Config, workers: Workers) -> RankingSums:
    sums = RankingSums()
    for histories in shards:
        valid = stage_examples(histories, "valid", config.model.max_len)
        ranked = rank_targets(model, histories, valid[workers.rank :: workers.size], config)
        sums += RankingSums.from_ranks(ranked)
    return RankingSums.from_vector(workers.add(sums.as_vector()))


def calibrate(model: MVRec, shards: Shards, config: Config, workers: Workers) -> Scaling:
    """Rescales a trained model's scores, so that their sigmoid is the share of validation's pairs that comes true, as
    far as a line can make it (Platt scaling); then those of new items, so that as many of them come true as it says. A
    NEW of the known items are read as if they were new for that."""
    a, c = _pairs(model, shards, config, workers).scaling((1.0, 1.0) if model.repeats is not None else STEEPNESS)
    model.rescale(Scaling(a, c))
    known = model.known.nonzero()[:, 0]
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(config.seed))
    some = known[drawn[: int(NEW * len(known))].to(known.device)]
    with model.as_if_new(some):
        certainty = _pairs(model, shards, config, workers, some).certainty(model.bias.item())
    model.rescale(Scaling(certainty=certainty))
    return Scaling(a, c, certainty)


def _pairs(
    model: MVRec, shards: Shards, config: Config, workers: Workers, among: Tensor | None = None
) -> CalibrationSums:
    """Of validation, over all workers; among: rows of the items that count, None: all."""
    sums = CalibrationSums.empty()
    for histories in shards:
        valid = stage_examples(histories, "valid", config.model.max_len)
        sums += pair_sums(model, histories, valid[workers.rank :: workers.size], config, among)
    counts = torch.from_numpy(np.stack([sums.pairs, sums.observed]).astype(np.float64))
    pairs, observed = workers.add(counts).numpy()
    return CalibrationSums(pairs, sums.predicted, observed)


def _too_few(windows: int, config: Config, workers: Workers) -> DataError:
    return DataError(
        f"{workers.size} workers need as many training windows and a batch_size as large, "
        f"found {windows} windows and train.batch_size {config.train.batch_size}"
    )


def _values(epoch: Epoch) -> dict[str, Any]:
    valid = None if epoch.valid is None else epoch.valid.as_vector().tolist()
    return {**asdict(replace(epoch, valid=None)), "valid": valid}


def _epoch(values: dict[str, Any]) -> Epoch:
    valid = values["valid"]
    sums = None if valid is None else RankingSums.from_vector(torch.tensor(valid, dtype=torch.float64))
    return Epoch(**{**values, "valid": sums, "again": True})


def autocast(config: Config, device: str) -> contextlib.AbstractContextManager[None]:
    """bf16 where the processor has it (or where the configuration insists), else full precision."""
    kind = torch.device(device).type
    wanted = config.train.precision
    able = torch.cuda.is_bf16_supported() if kind == "cuda" else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bf16" or (wanted == "auto" and able))
