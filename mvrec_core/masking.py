"""What the model sees when some views are hidden: their presence is false on the user's side and on the items'.

Nothing is trained again: a view may be missing anywhere, and a hidden one is missing everywhere. With a hidden `time`
view the times themselves are missing too, which the sequence encoder reads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch

from mvrec_core.batch import missing
from mvrec_core.config import Config
from mvrec_core.features import MISSING_TIME
from mvrec_core.model import ItemViews
from mvrec_core.sequences import Histories


def hide_items(views: ItemViews, config: Config, hidden: Collection[str]) -> ItemViews:
    """The item-level views [n, K] without those whose names are hidden."""
    shown = torch.tensor([name not in hidden for name in config.views_at("item")], device=views.present.device)
    return ItemViews(views.z, views.present & shown)


def hide_histories(histories: Histories, config: Config, hidden: Collection[str]) -> Histories:
    """The histories without the event- and user-level views whose names are hidden."""
    timeless = any(config.views[name].kind == "time" for name in hidden)
    return replace(
        histories,
        time=np.full_like(histories.time, MISSING_TIME) if timeless else histories.time,
        now=np.full_like(histories.now, MISSING_TIME) if timeless else histories.now,
        event={name: _blank(values) if name in hidden else values for name, values in histories.event.items()},
        user={name: _blank(values) if name in hidden else values for name, values in histories.user.items()},
    )


def removable(config: Config) -> list[str]:
    """The views that can be hidden one at a time: all, but not the only one that items are ranked by."""
    items = config.views_at("item")
    return [name for name in config.views if len(items) > 1 or name not in items]


def _blank(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, missing(values))
