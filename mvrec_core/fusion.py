"""View weights. Shapes: K views, D dimensions of a view's vector, and any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ABSENT = -1e9  # the logit of a view that is not there


class GatedFusion(nn.Module):
    """W = softmax over the present views i of A_i z_i, and h = sum_i W_i z_i.

    Some of the views can be fused before the others: h and the log of their mass, log sum_i exp(A_i z_i), stand for
    them exactly, as one more view whose logit is that mass. So the item-level views of an item are fused once, however
    many steps it is in.
    """

    def __init__(self, views: int, dim: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(views, dim))

    def forward(
        self,
        z_KD: Tensor,
        present_K: Tensor,
        views: slice = slice(None),
        before: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z [..., K, D], present bool [..., K] -> h [..., D], weights [..., K] and the log of the mass [...].

        Weights sum to 1 over the present views and are 0 for the others; where no view is present, all are 0 and the
        mass is 0. `views` picks the A_i that z goes by. `before`: h [..., D] and log mass [...] of views that were
        fused already; their share comes first in the weights, then [..., 1 + K].
        """
        logit_K = (z_KD * self.A[views].to(z_KD.dtype)).sum(-1).float().masked_fill(~present_K, ABSENT)
        if before is not None:
            h_D, mass = before
            z_KD = torch.cat([h_D[..., None, :], z_KD], -2)
            logit_K = torch.cat([mass[..., None], logit_K], -1)
        mass = logit_K.logsumexp(-1).clamp(min=ABSENT)
        weight_K = (logit_K - mass[..., None]).exp() * (logit_K > ABSENT / 2)
        return (weight_K.to(z_KD.dtype)[..., None] * z_KD).sum(-2), weight_K, mass


class LinearFusion(nn.Module):
    """The source formulation: W_i = softmax(A_i x_i) over the D features of view i; v_i = W_i . x_i, one number."""

    def __init__(self, views: int, dim: int):
        super().__init__()
        self.A = nn.Parameter(torch.eye(dim).repeat(views, 1, 1))

    def forward(self, x_KD: Tensor, present_K: Tensor) -> Tensor:
        """x [..., K, D], present bool [..., K] -> v [..., K], 0 where a view is absent."""
        weight_KD = torch.einsum("kde,...ke->...kd", self.A, x_KD).softmax(-1)
        return (weight_KD * x_KD).sum(-1) * present_K
