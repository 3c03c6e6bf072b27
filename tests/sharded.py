"""Training on two workers, each a process of torch's own, that hold the text encoder whole or a part of it each:
python sharded.py ENCODER FOLDER [key=value]...

Writes <FOLDER>/whole.safetensors and sharded.safetensors, the weights of both; again.safetensors, those of a sharded
training that was stopped and went on; alone.safetensors, those of one that went on on one worker; the states where they
were stopped, in there/ for one that was not sharded, again/ and alone/; and held.json, the bytes that a worker holds in
weights and moments of the encoder.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from mvrec_core.checkpoint import new_model
from mvrec_core.config import Config
from mvrec_core.learner import Learner
from mvrec_core.model import MVRec
from mvrec_core.resume import States
from mvrec_core.sharding import local
from mvrec_core.training import fit
from mvrec_core.workers import Workers

SIZE = 2
STOP_AT = 5  # steps


class Stopped(Exception):
    pass


class StoppedStates(States):
    """States that stop a training once there is one."""

    def save(self, *given: object) -> None:
        super().save(*given)  # type: ignore[arg-type]
        raise Stopped


def add(tensor: Tensor) -> Tensor:
    there = tensor.clone()
    dist.all_reduce(there)
    return there


def wrap(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def trained(config: Config, states: States | None, workers: Workers) -> MVRec:
    data = tiny.data()
    shards = data.shards(config)
    model = new_model(config, data, shards)
    with contextlib.suppress(Stopped):
        for _ in fit(model, shards, config, workers, states=states):
            pass
    return model


def write(model: MVRec, path: Path, rank: int) -> None:
    assert model.text is not None
    model.text.gather(wanted=rank == 0)
    if rank == 0:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def bytes_held(config: Config, workers: int) -> int:
    """By this worker, of the encoder's weights and their moments, among so many workers."""
    data = tiny.data()
    model = new_model(config, data, data.shards(config))
    assert model.text is not None
    if workers > 1:
        model.text.shard("cpu", workers)
    learner = Learner(model, config, 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.step()
    weights = list(model.text.encoder.parameters())
    moments = [value for p in weights for value in learner.optimiser.state[p].values() if value.ndim]
    return sum(local(tensor).nbytes for tensor in (*weights, *moments))


def worker(rank: int, encoder: str, folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=SIZE)
    together = Workers(rank, SIZE, "cpu", wrap, add)
    whole = tiny.config(Path(encoder), f"train.save_steps={STOP_AT}", *overrides)
    sharded = whole.model_copy(update={"train": whole.train.model_copy(update={"shard_text": True})})

    write(trained(whole, None, together), folder / "whole.safetensors", rank)
    write(trained(sharded, None, together), folder / "sharded.safetensors", rank)
    held = {"whole": bytes_held(whole, 1), "sharded": bytes_held(whole, SIZE)}

    def kept(kind: type[States], name: str) -> States:
        return kind(folder / name, "the tiny logs", keep=100, say=lambda line: None)

    trained(whole, kept(StoppedStates, "there"), together)
    for name in ("again", "alone"):
        trained(sharded, kept(StoppedStates, name), together)
    write(trained(sharded, kept(States, "again"), together), folder / "again.safetensors", rank)
    dist.destroy_process_group()
    if rank == 0:
        write(trained(sharded, kept(States, "alone"), Workers()), folder / "alone.safetensors", rank)
        (folder / "held.json").write_text(json.dumps(held))


if __name__ == "__main__":
    mp.spawn(worker, (sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), nprocs=SIZE)
