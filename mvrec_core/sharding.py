"""What is shared out over the workers: a module's weights, gradients and moments (FSDP; Zhao et al., VLDB 2023), of
which each holds its part and gathers those of a layer while it computes it; and rows that each computes a part of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd, wait_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: str, workers: int) -> None:
    """Leaves every worker its part of each parameter, on its device. Needs torch's process group."""
    mesh = init_device_mesh(torch.device(device).type, (workers,))
    layers = [layer for several in module.modules() if isinstance(several, nn.ModuleList) for layer in several]
    for layer in reversed(layers):  # what is within another comes first
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # by default its own tensors would stay whole


def sharded(module: nn.Module) -> list[str]:
    """The names of the parameters that are shared out."""
    return [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]


def exempt(module: nn.Module) -> None:
    """Has DistributedDataParallel, which is to wrap the module, leave alone what is shared out in it."""
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded(module))


def local(tensor: Tensor) -> Tensor:
    """This worker's part, of the same memory; all of a tensor that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """This worker's part of `whole`, if `tensor` is shared out."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """The whole of each, those that were shared out on the CPU; every worker has to call it. Those that do not want it
    get those that were not shared out."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            whole = tensor.full_tensor()
            if wanted:
                found[name] = whole.cpu()
        else:
            found[name] = tensor
    return found


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients so that the norm of all is at most `limit`; returns what it was."""
    kinds: dict[bool, list[nn.Parameter]] = {}  # torch's norm does not take both kinds together
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    norms: list[Any] = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds.values()]  # type: ignore
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(whole))
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def gather_rows(mine: Tensor) -> Tensor:
    """[m, ...] of each worker -> [workers * m, ...] by rank; each gets the gradients that all have of its rows, added.
    Needs torch's process group."""
    return wait_tensor(all_gather_single_autograd(mine.contiguous(), 0, dist.group.WORLD))  # type: ignore[arg-type]
