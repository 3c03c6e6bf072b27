"""Losses over P targets: each scores the user's vector against items. Shapes: P targets, C candidates, D dimensions.

A score is s = cos / tau + b. The softmax losses do not move b, so they learn it apart: b = -log sum_j exp(cos_j / tau)
makes sigmoid(s_j) close to the softmax probability that j is the next item, wherever that probability is small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax(users_PD: Tensor, items_CD: Tensor, target_P: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue; users and items are unit vectors, target_P are rows of items."""
    logit_PC = ((users_PD / tau) @ items_CD.T).float()  # tau before the product: it is the smaller of the two
    loss_P = F.cross_entropy(logit_PC, target_P, reduction="none")
    positive_P = logit_PC.detach().gather(1, target_P[:, None])[:, 0]
    return loss_P.mean() + _fit_bias(loss_P + positive_P, bias)


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
