"""Items that come, change and go while a model serves: their rows behind, or in place of, those of its checkpoint.

Shapes: N catalogue rows, PAD and UNKNOWN included; m items; K item-level views, D dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mvrec_core.answers import Recommended
from mvrec_core.catalog import FIRST, Catalog
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import RequestError
from mvrec_core.features import item_features
from mvrec_core.index import NOTHING
from mvrec_core.model import ItemViews, MVRec
from mvrec_core.requests import Item, read_features
from mvrec_core.views import OF_EVENTS

CHUNK = 32  # items encoded together


@dataclass(frozen=True)
class Items:
    """All that can be ranked, at one moment: never changed, only followed by another.

    catalog   of N - FIRST items
    views     z [N, K, D] and present [N, K]
    vectors   unit vectors [N, D]
    weights   of the views [N, K]
    share     [N]: of train events
    gone      bool [N]: items that were removed. They keep their row, since a history may hold them.
    """

    catalog: Catalog
    views: ItemViews
    vectors: Tensor
    weights: Tensor
    share: Tensor
    gone: Tensor

    def __len__(self) -> int:
        """Items that may come: those that were not removed."""
        return len(self.catalog) - int(self.gone.sum())

    def masks(self) -> list[Tensor]:
        """Of a Filter: bool [N], what was not removed, where something was."""
        return [~self.gone] if bool(self.gone.any()) else []

    def check_k(self, k: int) -> None:
        """Raises RequestError for a list of fewer than one or more than all."""
        if not 1 <= k <= len(self):
            raise RequestError(f"k: expected 1 to {len(self)}, the size of the catalogue, found {k}", "k")

    def display(self, row: int) -> str | None:
        return self.catalog.display[row - FIRST] if row >= FIRST else None

    def recommended(self, rows: Sequence[int], scores: Sequence[float]) -> list[Recommended]:
        """A list of catalogue rows, best first, up to the first NOTHING."""
        out = []
        for place, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
            if row == NOTHING:
                break
            out.append(Recommended(self.catalog.ids.value(row), score, place, self.display(row)))
        return out

    def without(self, item_ids: Collection[str]) -> Items:
        """These without some; ids that are not here are passed over."""
        rows = self.catalog.ids.index(sorted(item_ids))
        gone = self.gone.clone()
        gone[torch.from_numpy(rows[rows >= FIRST]).to(gone.device)] = True
        return replace(self, gone=gone)

    def with_items(self, model: MVRec, data: Data, items: Sequence[Item]) -> Items:
        """These and m more, each once, with features; one that is here takes the new features and keeps its id's
        vector and its share. Raises RequestError naming the column of a wrong value."""
        rows = self.catalog.ids.index([item.item_id for item in items])
        known = rows >= FIRST
        n, place = len(self.vectors), np.arange(len(items))
        order = np.concatenate([np.arange(n), n + place[~known]])
        order[rows[known]] = n + place[known]

        table, views = encode(model, data, [item.features or {} for item in items], "items")
        if known.any():
            old = self.views[torch.from_numpy(rows[known])]
            kinds = [model.config.views[name].kind for name in model.item_view_names]
            for view in [place for place, kind in enumerate(kinds) if kind in OF_EVENTS]:
                views.z[known, view], views.present[known, view] = old.z[:, view], old.present[:, view]
        with torch.no_grad():
            vectors, weights = model.item_vectors(views)
        taken = torch.from_numpy(order).to(vectors.device)

        def then(old: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([old, new.to(old.dtype)])
            return both[taken] if known.any() else both

        shown = [item.display or _title(model.config, item.features or {}) for item in items]
        ids = pa.array([item.item_id for item in items], pa.string())
        table = table.append_column("item_id", ids).append_column("display", pa.array(shown, pa.string()))
        share = torch.cat([self.share, self.share.new_zeros(int((~known).sum()))])
        gone = torch.cat([self.gone, self.gone.new_zeros(int((~known).sum()))])
        gone[torch.from_numpy(rows[known])] = False
        return Items(
            self.catalog.changed(table, order[FIRST:] - FIRST),
            ItemViews(then(self.views.z, views.z), then(self.views.present, views.present)),
            then(self.vectors, vectors),
            then(self.weights, weights),
            share,
            gone,
        )


def encode(
    model: MVRec, data: Data, rows: Sequence[Mapping[str, Any]], where: str = "candidates"
) -> tuple[pa.Table, ItemViews]:
    """Raw columns of m items as the columns of a catalogue, and their views. Raises RequestError naming the column,
    which calls the items `where`."""
    table, texts = read_features(model.config, data.fitted, rows, where)
    features = item_features(model.config, table, data.fitted, rows_before=0)
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            parts.append(model.new_item_views({name: values[part] for name, values in features.items()}, texts[part]))
    text = model.config.text_view
    if text is not None:
        table = table.append_column(text, pa.array(texts, pa.string()))
    return table, ItemViews(torch.cat([p.z for p in parts]), torch.cat([p.present for p in parts]))


def _title(config: Config, features: Mapping[str, Any]) -> str | None:
    """What people see of an item, as prepare has it: the first of the text's columns."""
    view = None if config.text_view is None else config.views[config.text_view]
    title = None if view is None else features.get(view.columns[0])  # type: ignore[union-attr]
    return None if title is None else str(title)
