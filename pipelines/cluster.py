"""The Ray cluster that a verb runs on: the one it was submitted to, or a local one."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import ray

from mvrec_core.addresses import nobody_listens
from mvrec_core.errors import ResourceError


def connect(min_cpus: int = 1) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts one on this machine. Raises ResourceError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Torch's threads spin while they wait for each other. Where they must share a core with anything else, an epoch of
    # the demo took 63 s so, 7 s with a short spin; with two cores to themselves 4.9 s and 5.8 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # of workers: a task has one core; ours has started already
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        if nobody_listens(address):
            raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}'")
        try:
            _start(address, options)
        except ConnectionError:
            raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}'") from None
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < min_cpus:
        raise ResourceError(f"expected a cluster with {min_cpus} cores, found {cpus:g}")


def _start(address: str, options: dict[str, Any]) -> None:
    """On this machine twice: Ray gives itself 30 s, which may be too few where much else is done."""
    for last in (False, True) if address == "local" else (True,):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except ConnectionError:
            raise
        except Exception as error:  # Ray has no class of its own for it
            if "timed out" not in str(error):
                raise
            ray.shutdown()
            if last:
                raise ResourceError("Ray did not start in its time; this machine may be too busy: try again") from None


def node_cores() -> int:
    """Of the node that this runs on, as Ray counts them: a container may have fewer than its machine."""
    here = ray.get_runtime_context().get_node_id()
    counted = next((node["Resources"].get("CPU") for node in ray.nodes() if node["NodeID"] == here), None)
    return max(1, int(min(os.cpu_count() or 1, counted or math.inf)))


def cores() -> int:
    """Of the cluster that is joined."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
