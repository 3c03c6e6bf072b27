"""One worker of a training run among the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """This worker among the others; by default there is just one.

    wrap: makes a model synchronise its gradients; add: sums a tensor over all workers, who all wait for it
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor
