"""Two models' scores as one: each user's are standardised, then added with a weight that validation chooses."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = tuple(n / 10 for n in range(11))  # of the second model; 0 leaves the first alone


def standardised(scores_BN: Tensor, allowed_BN: Tensor) -> Tensor:
    """float64 [B, N]: each user's scores with mean 0 and deviation 1 over that user's candidates (z-score
    normalisation: Montague and Aslam, "Relevance Score Normalization for Metasearch", CIKM 2001); 0 everywhere where
    all candidates have one score. Raises nothing for NaN: the ranking does."""
    scores_BN = scores_BN.double()
    count_B1 = allowed_BN.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = scores_BN.masked_fill(~allowed_BN, 0).sum(1, keepdim=True) / count_B1
    centred_BN = scores_BN - mean_B1
    spread_B1 = (centred_BN.masked_fill(~allowed_BN, 0).square().sum(1, keepdim=True) / count_B1).sqrt()
    flat_B1 = spread_B1 <= 1e-9 * (1 + mean_B1.abs())
    return (centred_BN / spread_B1.masked_fill(flat_B1, 1)).masked_fill(flat_B1, 0)


def blend(first_BN: Tensor, second_BN: Tensor, weight: float) -> Tensor:
    """CombSUM of standardised scores (Fox and Shaw, TREC-2 1994), weighted: (1 - weight) first + weight second."""
    return torch.lerp(first_BN, second_BN, weight)
