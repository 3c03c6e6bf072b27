"""`prepare` that is killed or runs out of disk: a reader sees the old data or the new, and a rerun succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from logs import config_of, run, write_events

from mvrec_core.errors import ResourceError
from pipelines.datasets import load
from pipelines.manifests import load as load_manifest

pytestmark = pytest.mark.ray

ROWS = [(f"u{n % 97}", f"i{n % 31}", str(n), str(n % 5)) for n in range(60_000)]


@pytest.fixture
def config(tmp_path):
    write_events(tmp_path / "logs", 6, ROWS)
    return config_of(tmp_path, tmp_path / "logs", buckets=16)


def start(config, tmp_path) -> subprocess.Popen:
    """`mvrec prepare` in a process of its own, with a Ray of its own."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.cli", "prepare", "--config", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(3600):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("it did not come so far in three minutes")


def made(config) -> list[Path]:
    return list(config.run_dir.glob("prepared.tmp-*/events/*/*.parquet"))


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_a_killed_driver_leaves_the_old_data_and_a_rerun_succeeds(tmp_path, ray_local, config, moment):
    whole = run(config)["content_hash"]
    process = start(config, tmp_path)
    parts = f"{config.run_dir}/prepared.tmp-*"
    wait_for(lambda: list(config.run_dir.glob("prepared.tmp-*")) if moment == "reading" else made(config), process)
    assert process.poll() is None, "it ended before it could be killed"
    daemons = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for daemon in psutil.wait_procs(daemons, timeout=5)[1]:  # its Ray, which nobody is left to stop
        daemon.kill()
    assert load_manifest(config.run_dir / "prepared")["content_hash"] == whole
    assert len(load(config).users) == 97
    assert list(config.run_dir.glob("prepared.tmp-*")), parts
    assert run(config)["content_hash"] == whole
    assert [path.name for path in config.run_dir.iterdir()] == ["prepared"]


def test_a_killed_worker_is_replaced(tmp_path, ray_local, config):
    whole = run(config_of(tmp_path, tmp_path / "logs", "whole", buckets=16))["content_hash"]
    process = start(config, tmp_path)
    busy: list[psutil.Process] = []

    def at_work() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end while they are looked at
            children = psutil.Process(process.pid).children(recursive=True)
            busy.extend(child for child in children if child.name().startswith("ray::MapBatches"))
        return bool(busy)

    wait_for(at_work, process)
    busy[0].kill()
    output = process.communicate(timeout=120)[0]
    assert busy and process.returncode == 0, output
    assert load_manifest(config.run_dir / "prepared")["content_hash"] == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_clear_error(tmp_path, ray_local, config):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ResourceError, match=r"no space left on the disk; nothing was published"):
            run(config.model_copy(update={"runs": str(disk)}))
        assert not list((disk / "run").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
