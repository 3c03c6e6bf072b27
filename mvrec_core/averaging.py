"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a model's trained weights: what is validated and kept."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.held = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """After a step; the first steps weigh less, so that the start is soon forgotten."""
        self.steps += 1
        torch._foreach_lerp_(self.held, self.live, 1 - min(self.decay, self.steps / (self.steps + 10)))

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the model, or the trained weights back."""
        for live, held in zip(self.live, self.held, strict=True):
            kept = live.clone()
            live.copy_(held)
            held.copy_(kept)
