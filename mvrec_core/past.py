"""What came before a target in its user's history: what may not stand among its candidates.

Shapes: B users, L steps, T = L + 1 outputs, P targets, C items sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core.batch import Batch


@dataclass(frozen=True)
class Past:
    """What came before each of P targets: user_P, output_P [P] where the target stands; item_PL [P, L] the steps of its
    user; there_PL which of them came before it, and are of a known item."""

    user_P: Tensor
    output_P: Tensor
    item_PL: Tensor
    there_PL: Tensor

    @staticmethod
    def of(batch: Batch, wanted_BT: Tensor, known: Tensor) -> Past:
        user_P, output_P = wanted_BT.nonzero(as_tuple=True)
        item_PL = batch.item[user_P]
        step = torch.arange(item_PL.shape[1], device=item_PL.device)
        return Past(user_P, output_P, item_PL, (step < output_P[:, None]) & known[item_PL])

    def among(self, item_BL: Tensor, sampled_C: Tensor) -> Tensor:
        """bool [P, C]: which of the items sampled came before each target."""
        length = item_BL.shape[1]
        step_L1 = torch.arange(length, device=item_BL.device)[:, None]
        first_BLC = torch.where(item_BL[..., None] == sampled_C, step_L1, length)
        first_BC = F.pad(first_BLC, (0, 0, 0, 1), value=length).amin(1)  # there may be no step
        return first_BC[self.user_P] < self.output_P[:, None]

    def latest(self, item_BL: Tensor) -> Tensor:
        """bool [P, L]: there_PL, of each item just the last step before the target."""
        length = item_BL.shape[1]
        step = torch.arange(length, device=item_BL.device)
        later_BLL = same(item_BL) & (step > step[:, None])
        next_BL = F.pad(torch.where(later_BLL, step, length), (0, 1), value=length).amin(2)
        return self.there_PL & (next_BL[self.user_P] >= self.output_P[:, None])


def same(item_BL: Tensor) -> Tensor:
    """bool [B, L, L]: which steps are of the same item."""
    return item_BL[:, :, None] == item_BL[:, None]
