"""What a model ranks: the catalogue's vectors, users' vectors, and where targets stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core.batch import collate
from mvrec_core.catalog import FIRST, PAD
from mvrec_core.config import Config
from mvrec_core.features import MISSING_TIME
from mvrec_core.metrics import Ranks, ranks
from mvrec_core.model import ROWS_GRAIN, ItemViews, MVRec
from mvrec_core.policy import Filter, eligible
from mvrec_core.sequences import Examples, Histories, stage_examples


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
    batch = collate(histories, examples).to(model.popularity.device)
    if not timed:
        batch = replace(batch, now=torch.full_like(batch.now, int(MISSING_TIME)))
    needed, row = batch.item.unique(return_inverse=True)  # of a large catalogue a batch reads few items
    needed = F.pad(needed, (0, -len(needed) % ROWS_GRAIN), value=PAD)
    vectors_BTD = model.user_vectors(batch, views[needed], row)
    return vectors_BTD[torch.arange(len(examples), device=vectors_BTD.device), batch.length]


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
