"""Top-k over the catalogue: exact, in bounded memory, the same list every time.

Shapes: B requests, N catalogue rows, C rows of a chunk, D dimensions, K results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core.errors import MVRecError

NOTHING = -1  # fills the slots of a list when fewer than k items are eligible


@dataclass(frozen=True)
class TopK:
    """The best first; where scores are equal, the lower index first.

    index: int64 [B, K], rows of the catalogue; NOTHING in slots that no eligible item fills, always the last ones
    score: float [B, K]; -inf in those slots
    """

    index: Tensor
    score: Tensor


def top_k(
    users_BD: Tensor,
    items_ND: Tensor,
    k: int,
    eligible_BN: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    row_BL: Tensor | None = None,
    lift_BL: Tensor | None = None,
    chunk: int = 65536,
) -> TopK:
    """The k eligible items with the highest scale * <user, item> + bias + lift. At most B x chunk scores exist at a
    time.

    row_BL, lift_BL: int64 rows of items, and what these score more for the user; None: none does
    eligible_BN: bool, True where the item may come (policy.eligible); None for all
    scale, bias: numbers, or one-element tensors

    Raises ValueError for k < 1 or shapes that do not fit together, MVRecError for a score that is not a number.
    """
    shape_BN = (len(users_BD), len(items_ND))
    if k < 1 or users_BD.shape[1] != items_ND.shape[1]:
        raise ValueError(f"expected k >= 1 and equal widths, found {k}, {users_BD.shape[1]} and {items_ND.shape[1]}")
    if eligible_BN is not None and (eligible_BN.shape != shape_BN or eligible_BN.dtype != torch.bool):
        raise ValueError(f"expected eligible bool {[*shape_BN]}, found {eligible_BN.dtype} {[*eligible_BN.shape]}")
    score_BK = users_BD.new_full((len(users_BD), k), -torch.inf)
    index_BK = torch.full_like(score_BK, NOTHING, dtype=torch.int64)
    for start in range(0, len(items_ND), chunk):
        scores_BC = users_BD @ items_ND[start : start + chunk].T * scale + bias
        if row_BL is not None and lift_BL is not None:
            here_BL = (row_BL >= start) & (row_BL < start + chunk)
            column_BL = torch.where(here_BL, row_BL - start, 0)
            scores_BC = scores_BC.scatter_add(1, column_BL, lift_BL.masked_fill(~here_BL, 0.0).to(scores_BC.dtype))
        if torch.isnan(scores_BC).any():
            raise MVRecError("the model's scores are not numbers (NaN), so items cannot be ranked")
        if eligible_BN is not None:
            scores_BC = scores_BC.masked_fill(~eligible_BN[:, start : start + chunk], -torch.inf)
        chunk_BK = _best(scores_BC, min(k, scores_BC.shape[1]))
        # earlier chunks stand first, so the stable sort keeps the lower index first
        score_B2K = torch.cat([score_BK, scores_BC.gather(1, chunk_BK)], dim=1)
        index_B2K = torch.cat([index_BK, chunk_BK + start], dim=1)
        score_BK, order_BK = _sorted(score_B2K, k)
        index_BK = index_B2K.gather(1, order_BK)
    return TopK(index_BK.masked_fill(score_BK == -torch.inf, NOTHING), score_BK)


def best(scores_BN: Tensor, k: int) -> TopK:
    """The k highest of scores that are there already, in the same order; -inf marks what may not come. Fewer than k
    columns leave slots of NOTHING. Raises ValueError for k < 1, MVRecError for a score that is not a number."""
    if k < 1:
        raise ValueError(f"expected k >= 1, found {k}")
    if torch.isnan(scores_BN).any():
        raise MVRecError("scores: expected numbers to rank by, found NaN")
    column_Bk = _best(scores_BN, min(k, scores_BN.shape[1]))
    score_Bk, order_Bk = _sorted(scores_BN.gather(1, column_Bk), k)
    missing = (0, k - score_Bk.shape[1])
    index_BK = F.pad(column_Bk.gather(1, order_Bk), missing, value=NOTHING)
    score_BK = F.pad(score_Bk, missing, value=-torch.inf)
    return TopK(index_BK.masked_fill(score_BK == -torch.inf, NOTHING), score_BK)


def _best(scores_BC: Tensor, k: int) -> Tensor:
    """int64 [B, k]: columns of the k highest scores, ascending; of equal scores on the border the lower columns."""
    value_Bk, column_Bk = torch.topk(scores_BC, k)
    border_B1 = value_Bk[:, -1:]
    (crowded,) = ((scores_BC >= border_B1).sum(1) > k).nonzero(as_tuple=True)
    if len(crowded):  # torch.topk takes any of the tied: count them off from the left instead
        scores, border = scores_BC[crowded], border_B1[crowded]
        above, tied = scores > border, scores == border
        chosen = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
        column_Bk[crowded] = chosen.nonzero()[:, 1].view(len(crowded), k)
    return column_Bk.sort(1).values


def _sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]
