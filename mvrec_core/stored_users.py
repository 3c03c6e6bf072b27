"""What a model makes of the users that its checkpoint holds, stage by stage: evaluation and batch lists.

Stages: "valid" and "test", of the users that have a target there, from what came before it; "live", of all users, from
all that they did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mvrec_core import ranking
from mvrec_core.catalog import FIRST
from mvrec_core.config import Config
from mvrec_core.explanations import user_weights
from mvrec_core.index import TopK, top_k
from mvrec_core.live_items import Items
from mvrec_core.masking import hide_histories, hide_items
from mvrec_core.metrics import Ranks
from mvrec_core.model import MVRec
from mvrec_core.policy import Filter, eligible
from mvrec_core.ranking import Users, rank_scores
from mvrec_core.sequences import Examples, Histories, live_examples, stage_examples


@dataclass(frozen=True)
class StoredUsers:
    """Their histories, the model, and the items that it ranks, but for those that were removed."""

    config: Config
    model: MVRec
    histories: Histories
    items: Items

    @torch.no_grad()
    def ranks(
        self, stage: str, hidden: Collection[str] = (), timed: bool = True, most: int | None = None
    ) -> tuple[Examples, Ranks]:
        """The users that have a target in "valid" or "test", and where it stands among the whole catalogue when the
        hidden views are not there; with `timed` False, when the model is not told at what time the target happened.

        most: users; of more than that so many, evenly from all
        """
        examples = self._stage(stage, most)
        exclude_seen = self.config.evaluate.exclude_seen
        ranked = [
            rank_scores(users.scores(self.model, items), self.histories, part, exclude_seen)
            for part, users, items in self._encoded(examples, hidden, timed)
        ]
        return examples, Ranks.concatenate(ranked)

    def best_rows(
        self, stage: str, k: int, hidden: Collection[str] = (), most: int | None = None
    ) -> tuple[Examples, torch.Tensor]:
        """The same users and their k best catalogue rows, int64 [B, k], NOTHING where fewer may come."""
        examples = self._stage(stage, most)
        best = [
            self._top_k(users, items, k, self._mask(part)).index
            for part, users, items in self._encoded(examples, hidden)
        ]
        return examples, torch.cat([torch.empty(0, k, dtype=torch.int64, device=self._device), *best])

    def view_weights(self, stage: str) -> tuple[Examples, list[dict[str, float]]]:
        """The same users and the mean view weights of their steps, {} where there are none."""
        examples = stage_examples(self.histories, stage, self.config.model.max_len)
        parts = _parts(examples, self.config.evaluate.batch_size)
        return examples, [w for p in parts for w in user_weights(self.model, self.histories, p, self.items.views)]

    @torch.no_grad()
    def scores(self, stage: str, batch_size: int) -> Iterator[tuple[Examples, torch.Tensor]]:
        """The same users, a batch at a time or a part of one, and their scores of all rows of the catalogue, float32
        [B, N]."""
        examples = stage_examples(self.histories, stage, self.config.model.max_len)
        views, vectors = self.items.views, self.items.vectors
        for part, users in ranking.encoded(self.model, self.histories, examples, views, vectors, batch_size):
            yield part, users.scores(self.model, vectors)

    @torch.no_grad()
    def lists(self, stage: str, k: int, users: slice = slice(None), now: int | None = None) -> pa.Table:
        """user_id, rank (from 1), item_id, score: "test" from what came before the test event, the
        lists that the metrics are computed from; "live" from all history. Raises RequestError for a bad k.

        now: of "live", when they will be read, in microseconds; None: it is not known
        users: which of them; where it begins at a multiple of evaluate.batch_size the lists are the same to the bit
        """
        self.items.check_k(k)
        histories = self.histories
        if stage == "live" and now is not None:
            histories = replace(histories, now=np.full_like(histories.now, now))
        examples = (
            live_examples(histories, self.config.model.max_len)
            if stage == "live"
            else stage_examples(histories, stage, self.config.model.max_len)
        )
        columns: dict[str, list[Any]] = {"user_id": [], "rank": [], "item_id": [], "score": []}
        for part, encoded, vectors in self._encoded(examples[users], histories=histories):
            found = self._top_k(encoded, vectors, k, self._mask(part))
            for user, index, score in zip(part.user.tolist(), found.index.tolist(), found.score.tolist(), strict=True):
                user_id = self.histories.user_ids[user].as_py()
                for recommended in self.items.recommended(index, score):
                    columns["user_id"].append(user_id)
                    columns["rank"].append(recommended.rank)
                    columns["item_id"].append(recommended.item_id)
                    columns["score"].append(recommended.score)
        kinds = {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}
        return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})

    @torch.no_grad()
    def _encoded(
        self,
        examples: Examples,
        hidden: Collection[str] = (),
        timed: bool = True,
        histories: Histories | None = None,
    ) -> Iterator[tuple[Examples, Users, torch.Tensor]]:
        """Some examples at a time, of the stored histories or others, their users and the catalogue's vectors [N, D],
        without the hidden views."""
        views, items, histories = self.items.views, self.items.vectors, histories or self.histories
        if hidden:
            views = hide_items(views, self.config, hidden)
            items = ranking.item_vectors(self.model, views)[0]
            histories = hide_histories(histories, self.config, hidden)
        size = self.config.evaluate.batch_size
        for part, users in ranking.encoded(self.model, histories, examples, views, items, size, timed):
            yield part, users, items

    def _stage(self, stage: str, most: int | None) -> Examples:
        examples = stage_examples(self.histories, stage, self.config.model.max_len)
        if most is None or len(examples) <= most:
            return examples
        return examples[np.linspace(0, len(examples) - 1, most).astype(np.int64)]

    def _mask(self, examples: Examples) -> torch.Tensor:
        """bool [B, N]: what each example's list may hold; by configuration, not the items of its history."""
        ends = zip(examples.user, examples.stop, strict=True)
        seen = [self.histories.item[self.histories.events_of(user, stop)] for user, stop in ends]
        left_out = [item[item >= FIRST] if self.config.evaluate.exclude_seen else () for item in seen]
        masks = self.items.masks()
        return eligible([Filter(rows, masks=masks) for rows in left_out], len(self.items.vectors), self._device)

    def _top_k(self, users: Users, items_ND: torch.Tensor, k: int, mask_BN: torch.Tensor) -> TopK:
        scale, bias = 1 / self.model.tau, self.model.bias
        return top_k(users.vector, items_ND, k, mask_BN, scale, bias, users.row, users.lift)

    @property
    def _device(self) -> torch.device:
        return self.items.vectors.device


def _parts(examples: Examples, size: int) -> Iterator[Examples]:
    return (examples[start : start + size] for start in range(0, len(examples), size))
