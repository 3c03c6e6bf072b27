"""The Ray cluster that a verb runs on: the one it was submitted to, or a local one."""

from __future__ import annotations

import logging
import os

import ray

from mvrec_core.errors import ResourceError


def connect(min_cpus: int = 1) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts one on this machine. Raises ResourceError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        options = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, **options)
        except ConnectionError:
            raise ResourceError(f"RAY_ADDRESS: no Ray cluster answers at '{address}'") from None
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < min_cpus:
        raise ResourceError(f"expected a cluster with {min_cpus} cores, found {cpus:g}")
