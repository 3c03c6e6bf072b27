"""Where training stands, kept so that it can go on: the last few states, each whole or not there.

step-0000000120/        optimiser steps done
    state.json          what it is a state of, and where training stands
    tensors.safetensors the same on every worker: weights, their average, the best ones, the optimiser's moments
    manifest.json       sha256 of each file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvrec_core.errors import CheckpointError, ResourceError
from mvrec_core.sealed import seal, verify
from mvrec_core.workers import Workers

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """
    progress: where training stands, as JSON has it
    tensors:  the same on every worker
    """

    progress: dict[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class States:
    """The states in a directory that all workers share.

    of:   what they must be states of: a digest of data and configuration
    keep: how many to keep
    say:  takes a line for people, from the worker of rank 0
    """

    directory: Path
    of: str
    keep: int = 2
    say: Callable[[str], None] = field(default=print)

    def newest(self, workers: Workers) -> State | None:
        """The newest whole state; every worker gets the same. What is damaged is said and deleted, and so are states
        of other data or another configuration."""
        step = self._newest() if workers.rank == 0 else 0
        step = int(workers.add(torch.tensor(step)))
        if not step:
            return None
        there = self._of_step(step)
        progress = json.loads((there / "state.json").read_text(encoding="utf-8"))["progress"]
        return State(progress, load_file(there / "tensors.safetensors"))

    def save(self, step: int, state: State, workers: Workers) -> None:
        """Every worker calls it after the same step. Raises ResourceError where the disk is full."""
        aside = self.directory / f"{self._of_step(step).name}.tmp"
        try:
            aside.mkdir(parents=True, exist_ok=True)
            if workers.rank == 0:
                _write(state.tensors, aside / "tensors.safetensors")
                tree = {"of": self.of, "progress": state.progress}
                (aside / "state.json").write_text(json.dumps(tree), encoding="utf-8")
            workers.add(torch.zeros(1))  # all have written
            if workers.rank == 0:
                seal(aside)
                aside.rename(self._of_step(step))
        except (OSError, SafetensorError) as error:
            if "No space left" in str(error):
                raise ResourceError(f"{aside}: no space left on the disk; the state before it is kept") from None
            raise
        if workers.rank == 0:
            for old in sorted(self.directory.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)

    def _of_step(self, step: int) -> Path:
        return self.directory / f"step-{step:010d}"

    def _newest(self) -> int:
        for left in self.directory.glob("*.tmp"):
            shutil.rmtree(left)
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            try:
                verify(path)
                of = json.loads((path / "state.json").read_text(encoding="utf-8"))["of"]
            except CheckpointError as error:
                self.say(f"{error}; going on from the state before")
                shutil.rmtree(path)
                continue
            if of != self.of:
                self.say(f"{path}: is of other data or another configuration; training starts anew")
                shutil.rmtree(self.directory)
                break
            return int(path.name.removeprefix("step-"))
        return 0


def _write(tensors: Tensors, path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
