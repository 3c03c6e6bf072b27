"""What a stage gave: ranks, lists and probabilities of each model, added up a batch of users at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvrec_core.beyond_accuracy import ListSums, Space
from mvrec_core.calibration import CalibrationSums
from mvrec_core.metrics import RankingSums, Ranks
from mvrec_core.sequences import Examples

LISTS = (10, 20)  # lengths of the lists that are looked at beyond accuracy
CALIBRATED = 10  # of each user's list, the pairs that are calibrated besides all pairs


@dataclass
class Found:
    """What a stage gave so far, by model: its name, or (name, weight) of a blend of ours with it.

    spaces: what lists are measured in; None: this stage's lists and probabilities are not looked at
    train:  int64 [N], train events of each catalogue row
    """

    spaces: Mapping[str, Space] | None
    train: np.ndarray
    parts: list[Examples] = field(default_factory=list)
    ranked: dict[Any, list[Ranks]] = field(default_factory=lambda: defaultdict(list))
    lists: dict[tuple[str, int], ListSums] = field(default_factory=dict)
    pairs: CalibrationSums = field(default_factory=CalibrationSums.empty)
    top_pairs: CalibrationSums = field(default_factory=CalibrationSums.empty)

    def ranks(self, model: Any) -> Ranks:
        return Ranks.concatenate(self.ranked[model])

    def means(self, model: Any) -> dict[str, float]:
        return RankingSums.from_ranks(self.ranks(model)).means()

    def examples(self) -> Examples:
        return Examples(
            *(
                np.concatenate([getattr(p, name) for p in self.parts] or [np.empty(0, np.int64)])
                for name in ("user", "start", "stop", "first", "limit")
            )
        )

    def beyond(self, model: str) -> dict[str, float]:
        out: dict[str, float] = {}
        for k in LISTS:
            if (model, k) in self.lists:
                out |= self.lists[model, k].means(self.train)
        return out

    def add_lists(self, model: str, lists_BK: Tensor, histories: list[np.ndarray]) -> None:
        for k in LISTS:
            sums = ListSums.of(lists_BK[:, :k], histories, self.train, self.spaces or {})
            self.lists[model, k] = self.lists[model, k] + sums if (model, k) in self.lists else sums

    def add_pairs(self, scores_BN: Tensor, allowed_BN: Tensor, target_B: Tensor, lists_BK: Tensor) -> None:
        """The probabilities of ours: of all candidates, and of those at the top of the lists."""
        outcome_BN = torch.zeros_like(allowed_BN)
        rankable_B = target_B >= 0
        outcome_BN[rankable_B, target_B[rankable_B]] = True
        self.pairs += CalibrationSums.of(scores_BN[allowed_BN], outcome_BN[allowed_BN])
        top_BK = lists_BK[:, :CALIBRATED]
        there_BK, safe_BK = top_BK >= 0, top_BK.clamp(min=0)
        self.top_pairs += CalibrationSums.of(
            scores_BN.gather(1, safe_BK)[there_BK], outcome_BN.gather(1, safe_BK)[there_BK]
        )
