"""What a verb finds of the cluster that it runs on."""

from __future__ import annotations

import os

import pytest

from pipelines.cluster import node_cores


@pytest.mark.ray
def test_in_a_container_the_cores_are_those_that_ray_counts(ray_local, monkeypatch):
    import ray

    assert node_cores() == min(os.cpu_count() or 1, 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of the machine around it
    assert node_cores() == 2
    assert ray.get(ray.remote(node_cores).remote()) <= 2
