"""Losses over P targets: each scores the user's vector against items. Shapes: P targets, C candidates, D dimensions.

A score is s = cos / tau + b. The softmax losses do not move b, so they learn it apart: b = -log sum_j exp(cos_j / tau)
makes sigmoid(s_j) close to the softmax probability that j is the next item, wherever that probability is small.

weight_P [P] is what each target counts, and a loss is the weighted mean over targets; None: all count the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = {"cpu": 1 << 19, "cuda": 1 << 27}  # that exist at a time: what a core's cache holds; few calls for a GPU


def softmax(
    users_PD: Tensor,
    items_CD: Tensor,
    target_P: Tensor,
    tau: Tensor,
    bias: Tensor,
    weight_P: Tensor | None = None,
    smoothing: float = 0.0,
    seen_PL: Tensor | None = None,
    mass_PL: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the whole catalogue; users and items are unit vectors, target_P are rows of items.

    smoothing: the share of a target's probability that goes to all items evenly (Szegedy et al., CVPR 2016)
    seen_PL: rows of items that the user has seen, the target where there is none; they are no candidates, or, with
    mass_PL, come again with as much more weight, log(1 + mass): see repeats.py
    """
    share_P = _shares(weight_P, users_PD)
    # tau before the product: it is the smaller of the two
    loss, normaliser_P = FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        users_PD / tau, items_CD, target_P, share_P, smoothing, seen_PL, mass_PL
    )
    return loss + _fit_bias(normaliser_P, bias)


class FullCrossEntropy(torch.autograd.Function):
    """Cross-entropy of u v^T without the [P, C] logits: they and their gradient exist for a few targets at a time, and
    the gradients of u and v are made in the same pass (as in Wijmans et al., "Cut Your Losses", ICLR 2025)."""

    @staticmethod
    def forward(
        ctx: Any,
        users_PD: Tensor,
        items_CD: Tensor,
        target_P: Tensor,
        share_P: Tensor,
        smoothing: float,
        seen_PL: Tensor | None,
        mass_PL: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """-> the loss, a sum over targets by their shares, and the log of the normaliser [P], without gradient."""
        kind, count = users_PD.device.type, len(users_PD)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else users_PD.dtype
        rows_at_once = max(1, LOGITS[kind] // len(items_CD))
        more = -count % rows_at_once if kind == "cpu" else 0  # zeros behind, so that all products have the same shape
        u_PD, v_CD = F.pad(users_PD.to(narrow), (0, 0, 0, more)), items_CD.to(narrow)
        column_P1, share_P1 = F.pad(target_P, (0, more))[:, None], F.pad(share_P, (0, more))[:, None]
        seen_PL = None if seen_PL is None else F.pad(seen_PL, (0, 0, 0, more))
        padded_PL = None if mass_PL is None else F.pad(mass_PL.detach(), (0, 0, 0, more))
        du_PD, dv_CD = torch.empty_like(u_PD), torch.zeros_like(items_CD)
        dmass_PL = None if padded_PL is None else torch.empty_like(padded_PL)
        loss_P, normaliser_P = torch.empty(2, len(u_PD), device=u_PD.device)
        for start in range(0, len(u_PD), rows_at_once):
            rows = slice(start, start + rows_at_once)
            column_p1 = column_P1[rows]
            logit_pC = u_PD[rows] @ v_CD.T
            if seen_PL is not None and padded_PL is None:
                target_p1 = logit_pC.gather(1, column_p1)
                logit_pC.scatter_(1, seen_PL[rows], -torch.inf).scatter_(1, column_p1, target_p1)
            if seen_PL is not None and padded_PL is not None:
                mass_pC = torch.zeros_like(logit_pC, dtype=torch.float32).scatter_add_(
                    1, seen_PL[rows], padded_PL[rows]
                )
                logit_pC = logit_pC.float() + mass_pC.log1p_()
            slope_pC = logit_pC.softmax(1, dtype=torch.float32)
            normaliser_p1 = logit_pC.amax(1, keepdim=True).float() - slope_pC.amax(1, keepdim=True).log()
            normaliser_P[rows] = normaliser_p1[:, 0]
            wanted_p1 = (1 - smoothing) * logit_pC.gather(1, column_p1).float()
            if smoothing:
                candidate_pC = logit_pC > -torch.inf
                even_p1 = smoothing / candidate_pC.sum(1, keepdim=True)
                wanted_p1 += even_p1 * logit_pC.float().masked_fill(~candidate_pC, 0.0).sum(1, keepdim=True)
                slope_pC.sub_(even_p1 * candidate_pC)
            loss_P[rows] = (normaliser_p1 - wanted_p1)[:, 0]
            slope_pC.scatter_add_(1, column_p1, slope_pC.new_full((1, 1), smoothing - 1).expand_as(column_p1))
            if seen_PL is not None and dmass_PL is not None:  # here mass_pC holds log(1 + mass)
                dmass_PL[rows] = (slope_pC * (-mass_pC).exp_()).gather(1, seen_PL[rows])
            slope_pC = slope_pC.to(narrow)
            du_PD[rows] = slope_pC @ v_CD
            dv_CD += slope_pC.T @ (u_PD[rows] * share_P1[rows].to(narrow))
        dmass_PL = None if dmass_PL is None else dmass_PL[:count]
        ctx.save_for_backward(du_PD[:count], dv_CD, share_P, dmass_PL)
        loss_P, normaliser_P = loss_P[:count], normaliser_P[:count]
        ctx.mark_non_differentiable(normaliser_P)
        return (loss_P * share_P).sum(), normaliser_P

    @staticmethod
    def backward(ctx: Any, loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        du_PD, dv_CD, share_P, dmass_PL = ctx.saved_tensors
        slope_P1 = share_P[:, None] * loss
        dmass_PL = None if dmass_PL is None else dmass_PL * slope_P1
        return du_PD.to(dv_CD.dtype) * slope_P1, dv_CD * loss, None, None, None, None, dmass_PL


def sampled_softmax(
    positive_P: Tensor,
    negative_PC: Tensor,
    target_P: Tensor,
    sampled_C: Tensor,
    log_q: Tensor,
    tau: Tensor,
    bias: Tensor,
    weight_P: Tensor | None = None,
    smoothing: float = 0.0,
    taken_PC: Tensor | None = None,
    more_P: Tensor | None = None,
    again_PL: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against C shared negatives drawn from q, with replacement: each logit is lowered by the log of the
    expected count C q (Bengio and Senecal, 2008; Yi et al., RecSys 2019), and a negative that is a target is left out.

    positive_P, negative_PC: cosines; sampled_C: items of the negatives; log_q [N]: log q of every item
    smoothing: as in softmax, over the target and the negatives
    taken_PC: bool, negatives that are left out too, since the user has seen them
    more_P, again_PL: where seen items may come again, what the target's logit has more, and the logits of what each
    user has seen, -inf where there is none or it is the target: these are all there, so they are not corrected
    """
    itself_PC = sampled_C == target_P[:, None]
    if taken_PC is not None:
        itself_PC = itself_PC | taken_PC
    positive_P = positive_P.float() / tau + (0.0 if more_P is None else more_P)
    logit_PC = negative_PC.float() / tau - (log_q[sampled_C] + math.log(len(sampled_C)))
    logit_PC = logit_PC.masked_fill(itself_PC, -torch.inf)
    against = [positive_P[:, None], logit_PC, *([] if again_PL is None else [again_PL])]
    normaliser_P = torch.cat(against, 1).logsumexp(1)
    wanted_P = positive_P
    if smoothing:
        total_P = positive_P + logit_PC.masked_fill(itself_PC, 0.0).sum(1)
        wanted_P = (1 - smoothing) * positive_P + smoothing * total_P / (1 + (~itself_PC).sum(1))
    loss_P = (normaliser_P - wanted_P) * _shares(weight_P, normaliser_P)
    return loss_P.sum() + _fit_bias(normaliser_P, bias)


def bce(positive_P: Tensor, negative_P: Tensor, tau: Tensor, bias: Tensor, weight_P: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of sigmoid(cos / tau + b), one negative a target."""
    loss_P = F.softplus(-(positive_P.float() / tau + bias)) + F.softplus(negative_P.float() / tau + bias)
    return (loss_P * _shares(weight_P, loss_P)).sum()


def gbce(
    positive_P: Tensor,
    negative_PC: Tensor,
    target_P: Tensor,
    sampled_C: Tensor,
    items: int,
    calibration: float,
    tau: Tensor,
    bias: Tensor,
    weight_P: Tensor | None = None,
) -> Tensor:
    """Generalised binary cross-entropy (Petrov and Macdonald, "gSASRec", RecSys 2023): the positive's probability is
    raised to beta = a (t (1 - 1 / a) + 1 / a), with a = C / (items - 1) the share of the items that are drawn, evenly,
    and t the calibration: 0 is binary cross-entropy, 1 gives probabilities as of all items. The mean over the target
    and its negatives; a negative that is the target is left out."""
    drawn = min(1.0, len(sampled_C) / max(1, items - 1))
    beta = drawn * (calibration * (1 - 1 / drawn) + 1 / drawn)
    there_PC = sampled_C != target_P[:, None]
    negative_P = (F.softplus(negative_PC.float() / tau + bias) * there_PC).sum(1)
    loss_P = (beta * F.softplus(-(positive_P.float() / tau + bias)) + negative_P) / (1 + there_PC.sum(1))
    return (loss_P * _shares(weight_P, loss_P)).sum()


def _shares(weight_P: Tensor | None, like: Tensor) -> Tensor:
    """float [P], sums to 1."""
    if weight_P is None:
        return torch.full((len(like),), 1 / max(1, len(like)), device=like.device)
    return weight_P / weight_P.sum()


def _fit_bias(normaliser_P: Tensor, bias: Tensor) -> Tensor:
    target = -normaliser_P.detach().mean()
    return F.smooth_l1_loss(bias, target) - F.smooth_l1_loss(bias.detach(), target)  # moves b, adds nothing to the loss
