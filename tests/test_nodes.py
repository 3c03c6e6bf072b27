"""Several nodes, each a Ray node of its own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.ray
def test_a_node_that_dies_is_replaced_and_the_weights_have_the_same_bits(tiny_encoder, tiny_logs, tmp_path):
    command = [sys.executable, HERE / "two_nodes.py", tiny_encoder, tiny_logs, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    out = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert out.returncode == 0, out.stderr[-3000:]
    told = json.loads(out.stdout.splitlines()[-1])
    assert told["equal"]
    assert told["lines"][0].startswith("train: 2 worker(s) on CPU")
    begun = [line for line in told["lines"] if line.startswith("epoch   1/60")]
    assert len(begun) == 2  # the second time it is told again, not trained
    assert told["refused"] == "train.workers is 5, but the cluster has 2 cores"
