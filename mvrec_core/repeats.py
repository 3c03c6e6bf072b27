"""How what a user has had before comes again: a term of the score, where seen items may be recommended.

    s(u, j) = cos(v_u, v_j) / tau + b + log(1 + sum over past events i of j of m_i)
    m_i = exp(w[steps since i] + g[time since i] + c . v_j)

so that an item's odds grow with how often and how lately it was taken: the copy mechanism of Gu et al. (ACL 2016) in
the form of counts. Where all m are zero it is the score without the term.

Shapes: B users, L steps, T = L + 1 outputs, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvrec_core.batch import Batch
from mvrec_core.catalog import FIRST
from mvrec_core.encoders import GAPS, gap_bucket

STEPS = 12  # buckets of a distance in steps, powers of two


class Repeats(nn.Module):
    def __init__(self, dim: int, timed: bool):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(STEPS))
        self.gap = nn.Parameter(torch.zeros(GAPS)) if timed else None
        self.item = nn.Parameter(torch.zeros(dim))

    def forward(self, batch: Batch, vector_BLD: Tensor) -> Tensor:
        """m [B, T, L] of each step for each output; 0 for a step that is not before it, or of no known item."""
        length = batch.item.shape[1]
        step = torch.arange(length, device=batch.item.device)
        output = torch.arange(length + 1, device=step.device)[:, None]
        back_TL = (output - 1 - step).clamp(min=0)
        log_BTL = self.steps[(back_TL + 1).log2().floor().long().clamp(max=STEPS - 1)][None]
        log_BTL = log_BTL + (vector_BLD.float() @ self.item)[:, None]
        if self.gap is not None:
            log_BTL = log_BTL + self.gap[gap_bucket(batch.time[:, None], batch.now[:, :, None])]
        there_BTL = (step < output) & (batch.item >= FIRST)[:, None]
        return log_BTL.clamp(max=20.0).exp() * there_BTL
