"""Training that is killed and goes on, each in a process of its own: python killed.py KILLS SEED ENCODER [key=value]...

Prints a line of JSON a kill: the step and the place, whether the weights came out with the same bits as those of a
training that was left alone, and how many steps were done twice.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import tiny
import torch
from safetensors.torch import load_file, save_file

from mvrec_core.checkpoint import Data, new_model
from mvrec_core.config import Config
from mvrec_core.resume import States
from mvrec_core.shards import Shards
from mvrec_core.training import fit
from mvrec_core.workers import Workers


def shards(config: Config, data: Data) -> Shards:
    """The users of the tiny logs in five parts, of which a shard has two or three."""
    parts = [Data(data.catalog, data.fitted, data.users.slice(start, 22)) for start in range(0, len(data.users), 22)]

    def read(chosen: tuple[int, ...]):
        users = pa.concat_tables([parts[place].users for place in chosen])
        return Data(data.catalog, data.fitted, users).histories(config)

    return Shards([len(part.histories(config).item) for part in parts], read, at_once=400)


def train(config: Config, folder: Path, die_at: int | None = None, in_save: bool = False) -> None:
    """Writes <folder>/weights.safetensors; with `die_at` the process ends at that step, or in the saving after it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    steps = 0

    class Counted(torch.nn.Module):
        def __init__(self, model: torch.nn.Module):
            super().__init__()
            self.model = model

        def forward(self, *given: object) -> torch.Tensor:
            nonlocal steps
            steps += 1
            with (folder / "steps.txt").open("a") as file:
                file.write(".")
            if steps == die_at and not in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.model(*given)

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if die_at is not None and in_save and steps >= die_at and list(folder.glob("states/*.tmp/state.json")):
            os.kill(os.getpid(), signal.SIGKILL)  # all is written, and nothing has its name
        return tensor

    data = tiny.data()
    of_parts = shards(config, data)
    model = new_model(config, data, of_parts)
    states = States(folder / "states", "the tiny logs", say=lambda line: None)
    for _ in fit(model, of_parts, config, Workers(wrap=Counted, add=add), states=states):
        pass
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")


def in_a_process(*given: object) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            train(*given)  # type: ignore[arg-type]
            os._exit(0)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main(kills: int, seed: int, encoder: str, overrides: list[str]) -> None:
    config = tiny.config(Path(encoder), "train.save_steps=3", *overrides)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as held:
        alone = Path(held) / "alone"
        alone.mkdir()
        assert in_a_process(config, alone) == 0
        expected = load_file(alone / "weights.safetensors")
        steps = len((alone / "steps.txt").read_text())
        for number in range(kills):
            folder = Path(held) / "killed"
            folder.mkdir()
            step, in_save = draw.randint(1, steps - 3), number % 3 == 2
            assert in_a_process(config, folder, step, in_save) == signal.SIGKILL
            if number % 4 == 3:  # and the newest state is damaged
                for newest in sorted((folder / "states").glob("step-*[0-9]"))[-1:]:
                    (newest / "tensors.safetensors").write_bytes(b"not what it was")
            assert in_a_process(config, folder) == 0
            found = load_file(folder / "weights.safetensors")
            equal = found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())
            twice = len((folder / "steps.txt").read_text()) - steps
            print(json.dumps({"step": step, "in_save": in_save, "equal": equal, "twice": twice}), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
