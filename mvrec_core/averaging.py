"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvrec_core.sharding import local


class Average:
    """The exponential moving average of a model's trained weights: what is validated and kept."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        self.held: list[Tensor] = [p.clone() for p in trained]
        self._live, self._held = [local(p) for p in trained], [local(p) for p in self.held]

    @torch.no_grad()
    def update(self) -> None:
        """After a step; the first steps weigh less, so that the start is soon forgotten."""
        self.steps += 1
        torch._foreach_lerp_(self._held, self._live, 1 - min(self.decay, self.steps / (self.steps + 10)))

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the model, or the trained weights back."""
        for live, held in zip(self._live, self._held, strict=True):
            kept = live.clone()
            live.copy_(held)
            held.copy_(kept)
