"""A text encoder, and the vectors of items, that are shared out over the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from mvrec_core.errors import ConfigError
from mvrec_core.sharding import clip, gathered, like, local, sharded

HERE = Path(__file__).parent
FIRST = "step-0000000005"
CLOSE = 1e-4  # sums of another order; Adam makes much of gradients that are nothing but rounding


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all numbers of both, to the length of those of one."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([tensors[name].double().flatten() for name in one]) for tensors in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_each_worker_holds_its_part_and_training_is_the_same(tiny_encoder, tmp_path, tune):
    overrides = [f"model.text.tune={tune}", "train.epochs=2", "train.precision=fp32", "model.dropout=0"]
    command = [sys.executable, HERE / "sharded.py", tiny_encoder, tmp_path, *overrides]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": "."})
    assert out.returncode == 0, out.stderr
    held = json.loads((tmp_path / "held.json").read_text())
    assert held["sharded"] < 0.55 * held["whole"]
    whole, parted, again, alone = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "sharded", "again", "alone")
    )
    assert all(torch.equal(again[name], value) for name, value in parted.items())
    assert distance(parted, whole) < CLOSE
    assert distance(alone, whole) < 0.02  # which has other draws
    one, other = (load_file(tmp_path / name / FIRST / "tensors.safetensors") for name in ("there", "alone"))
    assert one.keys() == other.keys()
    assert distance(one, other) < CLOSE


@pytest.mark.parametrize("overrides", [[], ["train.accumulate=3", "evaluate.exclude_seen=false"]])
def test_each_worker_makes_the_vectors_of_its_part_of_the_items_and_training_is_the_same(
    tiny_encoder, tmp_path, overrides
):
    same = ["train.epochs=2", "train.precision=fp32", "model.dropout=0", "model.view_dropout=0", *overrides]
    command = [sys.executable, HERE / "divided.py", tiny_encoder, tmp_path, *same]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": "."})
    assert out.returncode == 0, out.stderr
    assert json.loads((tmp_path / "made.json").read_text()) == {"whole": [48], "divided": [24]}
    whole, divided = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "divided"))
    assert distance(divided, whole) < CLOSE


def test_tensors_that_are_not_shared_out_are_what_they_are():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.full((3, 4), 2.0)
    norm = clip([weight, torch.nn.Parameter(torch.ones(2))], 1.0)
    torch.testing.assert_close(norm, torch.tensor(48.0).sqrt())
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(1.0))
    assert local(weight) is weight and like(weight, weight) is weight
    assert gathered({"weight": weight}, wanted=False) == {"weight": weight}
    assert sharded(torch.nn.Linear(2, 2)) == []


def test_adalora_is_not_shared_out(tiny_encoder):
    with pytest.raises(ConfigError, match="train.shard_text: adalora weighs whole matrices"):
        tiny.config(tiny_encoder, "model.text.tune=adalora", "train.shard_text=true")
