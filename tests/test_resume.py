"""Training that stops and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny
import torch

from mvrec_core.checkpoint import new_model
from mvrec_core.config import Config
from mvrec_core.errors import ResourceError
from mvrec_core.resume import State, States
from mvrec_core.training import fit
from mvrec_core.workers import Workers
from pipelines.train import train

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (4, ["train.epochs=3"]),
        (1, ["model.text.tune=adalora", "train.epochs=2"]),
        (1, ["model.text.tune=full"]),
        (1, ["model.text.tune=last_n"]),
    ],
)
def test_a_killed_training_ends_with_the_bits_of_one_left_alone(tiny_encoder, kills, overrides):
    command = [sys.executable, HERE / "killed.py", str(kills), "0", tiny_encoder, *overrides]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": "."})
    told = [json.loads(line) for line in out.stdout.splitlines()]
    assert [one["equal"] for one in told] == [True] * kills, out.stderr
    assert max(one["twice"] for one in told) <= 6  # at most the three steps between states, and three of a damaged one


def states(directory: Path, of: str = "x", **more) -> tuple[States, list[str]]:
    lines: list[str] = []
    return States(directory / "states", of, say=lines.append, **more), lines


def a_state(value: float) -> State:
    return State({"value": value}, {"weights": torch.full((3,), value)})


def test_the_last_states_are_kept_and_the_newest_is_read(tmp_path):
    kept, _ = states(tmp_path, keep=2)
    for step in (5, 9, 100):
        kept.save(step, a_state(step), Workers())
    assert sorted(p.name for p in kept.directory.iterdir()) == ["step-0000000009", "step-0000000100"]
    newest = kept.newest(Workers())
    assert newest.progress == {"value": 100} and newest.tensors["weights"].tolist() == [100.0] * 3


@pytest.mark.parametrize("damage", ["changed", "missing", "unfinished"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, damage):
    kept, lines = states(tmp_path)
    for step in (1, 2):
        kept.save(step, a_state(step), Workers())
    newest = kept.directory / "step-0000000002"
    if damage == "changed":
        (newest / "tensors.safetensors").write_bytes(b"no")
    elif damage == "missing":
        (newest / "state.json").unlink()
    else:
        newest.rename(newest.with_name(f"{newest.name}.tmp"))
    assert kept.newest(Workers()).progress == {"value": 1}
    assert [p.name for p in kept.directory.iterdir()] == ["step-0000000001"]
    told = {"changed": "tensors.safetensors: damaged: expected sha256", "missing": "state.json: missing"}
    assert len(lines) == (damage in told) and told.get(damage, "") in "".join(lines)


def test_a_state_of_other_data_is_not_gone_on_from(tmp_path):
    states(tmp_path, "one")[0].save(1, a_state(1), Workers())
    other, lines = states(tmp_path, "other")
    assert other.newest(Workers()) is None and not other.directory.exists()
    assert lines == [
        f"{other.directory}/step-0000000001: is of other data or another configuration; training starts anew"
    ]


def test_a_full_disk_is_one_clear_error_and_the_state_before_stays(tmp_path):
    kept, _ = states(tmp_path)
    kept.save(1, a_state(1), Workers())
    (kept.directory / "step-0000000002.tmp").mkdir()
    (kept.directory / "step-0000000002.tmp" / "state.json").symlink_to("/dev/full")
    with pytest.raises(
        ResourceError, match=r"step-0000000002.tmp: no space left on the disk; the state before it is kept"
    ):
        kept.save(2, a_state(2), Workers())
    assert kept.newest(Workers()).progress == {"value": 1}


class Stopped(Exception):
    pass


def together(size: int):
    """Workers that are threads of this process: what each adds is summed."""
    barrier, parts = threading.Barrier(size), {}

    def add_of(rank):
        def add(tensor):
            parts[rank] = tensor.clone()
            barrier.wait(60)
            total = sum(parts[r] for r in range(size))
            barrier.wait(60)
            return total

        return add

    return [{"rank": rank, "size": size, "add": add_of(rank)} for rank in range(size)]


def windows_read(data, config, folder, worker, stop_at=None):
    """The targets of each window that one worker reads, until it has read so many batches."""
    read: list[tuple[int, ...]] = []
    batches = 0

    class Reading(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch, *others):
            nonlocal batches
            if batches == stop_at:
                raise Stopped
            batches += 1
            read.extend(tuple(row[row > 1].tolist()) for row in batch.target)
            return self.model(batch, *others)

    shards = data.shards(config)
    kept = States(folder, "x", say=lambda line: None)
    with contextlib.suppress(Stopped):
        for _ in fit(new_model(config, data, shards), shards, config, Workers(**worker, wrap=Reading), states=kept):
            pass
    return read


def test_with_another_number_of_workers_what_is_left_of_the_epoch_is_read_once(plain_data, tiny_encoder, tmp_path):
    config = tiny.config(tiny_encoder, "train.save_steps=4", "train.epochs=1", "train.batch_size=8")
    whole = windows_read(plain_data, config, tmp_path / "whole", {})
    before = windows_read(plain_data, config, tmp_path / "parted", {}, stop_at=4)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(windows_read, plain_data, config, tmp_path / "parted", w) for w in together(2)]
        after = [job.result() for job in jobs]
    assert min(len(part) for part in (before, *after)) > 8
    assert sorted(before + after[0] + after[1]) == sorted(whole)


def lines_of(run: Path) -> list[str]:
    return (run / "train.log").read_text(encoding="utf-8").splitlines()


def until(there: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def model_of(run: Path) -> bytes:
    return (run / "checkpoint" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tiny_config, tiny_prepared, tmp_path_factory) -> tuple[Config, bytes]:
    """A run of many epochs that nobody disturbs: its configuration, and the weights that come out."""
    config = longer(tiny_config, tmp_path_factory.mktemp("alone"))
    train(config, log=lambda line: None)
    return config, model_of(config.run_dir)


def longer(config: Config, runs: Path, **changes) -> Config:
    (runs / config.name).mkdir()
    (runs / config.name / "prepared").symlink_to((config.run_dir / "prepared").absolute())
    changes = {"epochs": 40, "patience": 40, "save_steps": 5, **changes}
    return config.model_copy(update={"runs": str(runs), "train": config.train.model_copy(update=changes)})


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_costs_nothing_but_time(alone, tiny_config, tmp_path):
    config = longer(tiny_config, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(train, config, log=lambda line: None)
        until(lambda: job.done() or (config.run_dir / "train.log").exists() and len(lines_of(config.run_dir)) > 5)
        ours = psutil.Process().children(recursive=True)
        (worker,) = [process for process in ours if "RayTrainWorker" in process.name()]
        worker.kill()
        job.result()
    assert model_of(config.run_dir) == alone[1]
    assert not (config.run_dir / "resume").exists()
    epochs = [json.loads(line)["epoch"] for line in (config.run_dir / "curves.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 41))


@pytest.mark.ray
def test_a_killed_driver_is_started_again_and_goes_on(alone, tiny_config, tmp_path):
    config = longer(tiny_config, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.cli", "train", "--config", file]
    with (tmp_path / "told").open("wb") as told:
        first = subprocess.Popen(command, start_new_session=True, stdout=told, stderr=told)
    try:
        there = config.run_dir / "resume"
        until(lambda: first.poll() is not None or any(there.glob("choice/step-*[0-9]")))
        assert first.poll() is None, (tmp_path / "told").read_text(encoding="utf-8")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (config.run_dir / "checkpoint").exists()
    steps = sorted(path.name for path in (config.run_dir / "resume" / "choice").glob("step-*[0-9]"))
    train(config, log=lambda line: None)
    assert steps and model_of(config.run_dir) == alone[1]
