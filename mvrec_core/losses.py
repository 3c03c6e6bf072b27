"""Losses over P targets: each scores the user's vector against items. Shapes: P targets, C candidates, D dimensions.

A score is s = cos / tau + b. The softmax losses do not move b, so they learn it apart: b = -log sum_j exp(cos_j / tau)
makes sigmoid(s_j) close to the softmax probability that j is the next item, wherever that probability is small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 19  # that exist at a time: what a core's cache holds


def softmax(users_PD: Tensor, items_CD: Tensor, target_P: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue; users and items are unit vectors, target_P are rows of items."""
    # tau before the product: it is the smaller of the two
    loss, normaliser_P = FullCrossEntropy.apply(users_PD / tau, items_CD, target_P)  # type: ignore[no-untyped-call]
    return loss + _fit_bias(normaliser_P, bias)


class FullCrossEntropy(torch.autograd.Function):
    """Cross-entropy of u v^T without the [P, C] logits: they and their gradient exist for a few targets at a time, and
    the gradients of u and v are made in the same pass (as in Wijmans et al., "Cut Your Losses", ICLR 2025)."""

    @staticmethod
    def forward(ctx: Any, users_PD: Tensor, items_CD: Tensor, target_P: Tensor) -> tuple[Tensor, Tensor]:
        """-> the mean loss, and the log of the normaliser [P], which has no gradient."""
        kind, count = users_PD.device.type, len(users_PD)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else users_PD.dtype
        rows_at_once = max(1, LOGITS // len(items_CD))
        more = -count % rows_at_once  # zeros behind, so that all products have the same shape
        u_PD, v_CD = F.pad(users_PD.to(narrow), (0, 0, 0, more)), items_CD.to(narrow)
        column_P1 = F.pad(target_P, (0, more))[:, None]
        du_PD, dv_CD = torch.empty_like(u_PD), torch.zeros_like(items_CD)
        loss_P, normaliser_P = torch.empty(2, len(u_PD), device=u_PD.device)
        for start in range(0, len(u_PD), rows_at_once):
            rows = slice(start, start + rows_at_once)
            column_p1 = column_P1[rows]
            logit_pC = u_PD[rows] @ v_CD.T
            slope_pC = logit_pC.softmax(1, dtype=torch.float32)
            normaliser_p1 = logit_pC.amax(1, keepdim=True).float() - slope_pC.amax(1, keepdim=True).log()
            normaliser_P[rows] = normaliser_p1[:, 0]
            loss_P[rows] = (normaliser_p1 - logit_pC.gather(1, column_p1).float())[:, 0]
            slope_pC.scatter_add_(1, column_p1, slope_pC.new_full((1, 1), -1.0).expand_as(column_p1))
            slope_pC = slope_pC.to(narrow)
            du_PD[rows] = slope_pC @ v_CD
            dv_CD += slope_pC.T @ u_PD[rows]
        loss_P, normaliser_P, du_PD = loss_P[:count], normaliser_P[:count], du_PD[:count]
        ctx.save_for_backward(du_PD, dv_CD)
        ctx.mark_non_differentiable(normaliser_P)
        return loss_P.mean(), normaliser_P

    @staticmethod
    def backward(ctx: Any, loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        du_PD, dv_CD = ctx.saved_tensors
        share = loss / len(du_PD)
        return du_PD.to(dv_CD.dtype) * share, dv_CD * share, None


def sampled_softmax(
    positive_P: Tensor,
    negative_PC: Tensor,
    target_P: Tensor,
    sampled_C: Tensor,
    log_q: Tensor,
    tau: Tensor,
    bias: Tensor,
) -> Tensor:
    """Cross-entropy against C shared negatives drawn from q, with replacement: each logit is lowered by the log of the
    expected count C q (Bengio and Senecal, 2008; Yi et al., RecSys 2019), and a negative that is a target is left out.

    positive_P, negative_PC: cosines; sampled_C: items of the negatives; log_q [N]: log q of every item
    """
    expected = float(torch.tensor(float(len(sampled_C))).log())
    logit_PC = negative_PC.float() / tau - (log_q[sampled_C] + expected)
    logit_PC = logit_PC.masked_fill(sampled_C == target_P[:, None], -torch.inf)
    normaliser_P = torch.cat([(positive_P.float() / tau)[:, None], logit_PC], 1).logsumexp(1)
    return (normaliser_P - positive_P.float() / tau).mean() + _fit_bias(normaliser_P, bias)


def bce(positive_P: Tensor, negative_P: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(cos / tau + b), one negative a target."""
    return (F.softplus(-(positive_P.float() / tau + bias)) + F.softplus(negative_P.float() / tau + bias)).mean()


def _fit_bias(normaliser_P: Tensor, bias: Tensor) -> Tensor:
    target = -normaliser_P.detach().mean()
    return F.smooth_l1_loss(bias, target) - F.smooth_l1_loss(bias.detach(), target)  # moves b, adds nothing to the loss
