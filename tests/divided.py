"""Training on two workers, each a process of torch's own, that make the vectors of the whole catalogue or of a part of
it each: python divided.py ENCODER FOLDER [key=value]...

Writes <FOLDER>/whole.safetensors and divided.safetensors, the weights of both, and made.json, how many rows of items a
worker made in a step of each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from sharded import SIZE, add, trained, wrap

import mvrec_core.model
from mvrec_core.model import MVRec
from mvrec_core.sharding import gather_rows
from mvrec_core.text import Live
from mvrec_core.workers import Workers


def worker(rank: int, encoder: str, folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=SIZE)
    together = Workers(rank, SIZE, "cpu", wrap, add)
    mvrec_core.model.ROWS_GRAIN = 8  # so that both have items, of which there are few
    config = tiny.config(Path(encoder), *overrides)
    made: dict[str, list[int]] = {}
    item_views = MVRec.item_views
    for name, workers in (("whole", together), ("divided", replace(together, gather=gather_rows))):
        counts = made.setdefault(name, [])

        def counted(model: MVRec, item: torch.Tensor, live: Live | None = None, counts: list[int] = counts):
            if model.training:
                counts.append(len(item))
            return item_views(model, item, live)

        MVRec.item_views = counted  # type: ignore[method-assign]
        model = trained(config, None, workers)
        if rank == 0:
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
    dist.destroy_process_group()
    if rank == 0:
        (folder / "made.json").write_text(json.dumps({name: sorted(set(counts)) for name, counts in made.items()}))


if __name__ == "__main__":
    mp.spawn(worker, (sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), nprocs=SIZE)
