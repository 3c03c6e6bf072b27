"""View weights. Shapes: K views, D dimensions of a view's vector, and any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedFusion(nn.Module):
    """W = softmax over the present views i of A_i z_i, and h = sum_i W_i z_i."""

    def __init__(self, views: int, dim: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(views, dim))

    def forward(self, z_KD: Tensor, present_K: Tensor, views: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """z [..., K, D], present bool [..., K] -> h [..., D] and weights [..., K], which sum to 1 over the present
        views and are 0 for the others; where no view is present, both are 0. `views` picks the A_i that z goes by."""
        logit_K = (z_KD * self.A[views]).sum(-1).float().masked_fill(~present_K, -1e9)
        weight_K = logit_K.softmax(-1) * present_K
        return (weight_K.to(z_KD.dtype)[..., None] * z_KD).sum(-2), weight_K


class LinearFusion(nn.Module):
    """The source formulation: W_i = softmax(A_i x_i) over the D features of view i; v_i = W_i . x_i, one number."""

    def __init__(self, views: int, dim: int):
        super().__init__()
        self.A = nn.Parameter(torch.eye(dim).repeat(views, 1, 1))

    def forward(self, x_KD: Tensor, present_K: Tensor) -> Tensor:
        """x [..., K, D], present bool [..., K] -> v [..., K], 0 where a view is absent."""
        weight_KD = torch.einsum("kde,...ke->...kd", self.A, x_KD).softmax(-1)
        return (weight_KD * x_KD).sum(-1) * present_K
