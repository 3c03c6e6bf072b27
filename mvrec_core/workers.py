"""One worker of a training run among the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """This worker among the others; by default there is just one.

    wrap: makes a model synchronise its gradients
    add: sums a tensor over all workers, who all wait for it
    gather: all workers' rows in the order of their ranks, of a tensor of as many rows each; its gradient is the sum of
        theirs. None: no worker leaves a part of its work to another
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[Tensor], Tensor] | None = None


ALONE = Workers()
