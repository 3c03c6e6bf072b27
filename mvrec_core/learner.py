"""A model with its optimiser, its learning rate, and the average of its weights: what learns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mvrec_core.averaging import Average
from mvrec_core.config import Config
from mvrec_core.model import MVRec
from mvrec_core.resume import State, Tensors
from mvrec_core.sharding import clip, gathered, like
from mvrec_core.workers import Workers

WARMUP = 0.05  # share of the steps over which the learning rate rises
SCALAR_RATE = 10.0  # tau and b have further to go than a weight of a matrix
FUSED_FROM = 1 << 24  # parameters: as many are updated faster by one kernel, on a CPU too, with other last bits
SUMS = ("loss", "targets", "padding", "places", "norm", "steps")


@dataclass
class Progress:
    """Where training stands, but for tensors.

    epoch, shard, batch: the next batch: number `batch` of the shard's, of the shards of the epoch; epochs from 1
    step:   optimiser steps done
    sums:   of the epoch so far, over all workers, by SUMS
    best, stale: the best validation, and the epochs since
    epochs: those that are over, as JSON
    """

    epoch: int = 1
    shard: int = 0
    batch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))
    best: float = -1.0
    stale: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)


class Learner:
    """A model with its optimiser, its learning rate, and the average of its weights."""

    def __init__(self, model: MVRec, config: Config, steps: int):
        """steps: of the optimiser, about"""
        self.model, self.config, self.steps = model, config, steps
        self.optimiser = make_optimiser(model, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate(step, steps))
        self.average = Average(model, config.train.averaging)

    def step(self) -> Tensor:
        """With the gradients that are there, which it then takes away; their norm before they were clipped."""
        norm = clip(self.model.parameters(), 1.0).detach()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        self.average.update()
        return norm

    def state(self, at: Progress, best: Tensors, workers: Workers) -> State:
        """What `restore` makes the same again of a learner that is new."""
        optimiser = self.optimiser.state_dict()
        text = self.model.text
        kept, pattern = text.learning() if text is not None else ({}, {})
        tensors = {f"model.{name}": value for name, value in learnt(self.model).items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= {f"average.{place}": value for place, value in enumerate(self.average.held)}
        tensors |= {f"text.{name}": value for name, value in kept.items()}
        tensors |= {
            f"optimiser.{place}.{name}": value
            for place, values in optimiser["state"].items()
            for name, value in values.items()
        }
        progress = {
            **asdict(at),
            "groups": optimiser["param_groups"],
            "averaged": self.average.steps,
            "text": pattern,
        }
        return State(progress, gathered(tensors, workers.rank == 0))

    def restore(self, state: State) -> tuple[Progress, Tensors]:
        """Where training stands, and the best weights so far."""
        progress = dict(state.progress)
        groups, averaged, pattern = progress.pop("groups"), progress.pop("averaged"), progress.pop("text")
        at = Progress(**progress)
        device = self.model.popularity.device
        parts: dict[str, Tensors] = {"model": {}, "best": {}, "average": {}, "text": {}, "optimiser": {}}
        for name, value in state.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value if part == "optimiser" else value.to(device)
        here = self.model.state_dict()
        model, best = ({name: like(value, here[name]) for name, value in parts[of].items()} for of in ("model", "best"))
        self.model.load_state_dict(model, strict=False)
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            number, _, what = name.partition(".")
            whole = value.ndim == 0  # how many steps it was
            moments.setdefault(int(number), {})[what] = value if whole else like(value, parameters[int(number)])
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.schedule.last_epoch = at.step
        self.average.steps = averaged
        for place, held in enumerate(self.average.held):
            held.copy_(like(parts["average"][str(place)], held))
        text = self.model.text
        if text is not None:
            text.resume(parts["text"], pattern)
        return at, best


def learnt(model: MVRec) -> Tensors:
    """What training changes of a model's state: all of it, but for a text encoder that is frozen."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if model.text is not None and not model.text.tuned:
        fixed |= {name for name in model.state_dict() if name.startswith("text.")}
    return {name: value.detach() for name, value in model.state_dict().items() if name not in fixed}


def make_optimiser(model: MVRec, config: Config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019): the text encoder at its own rate, and no decay of vectors and scalars."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            text = name.startswith("text.")
            rate = config.model.text.lr if text else config.train.lr
            rate *= SCALAR_RATE if parameter.ndim == 0 else 1.0
            decay = config.train.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((text, rate, decay), []).append(parameter)
    large = sum(parameter.numel() for parameters in groups.values() for parameter in parameters) >= FUSED_FROM
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "weight_decay": decay} for (_, rate, decay), parameters in groups.items()],
        betas=(0.9, 0.98),
        fused=large or model.popularity.is_cuda,
    )


def rate(step: int, steps: int) -> float:
    warmup = max(1, int(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))  # steps is an estimate: windows differ by epoch
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
