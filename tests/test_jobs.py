"""The verbs as jobs of a real Ray with a dashboard and a token: ends, exit codes, logs, and what a run leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).with_name("ray")
PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
START_WITHIN_S = 90
JOB_WITHIN_S = 450  # a bound for a machine that does much else


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]
    ports: dict[str, int]

    def submit(self, *entrypoint: object) -> subprocess.Popen[str]:
        address = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        return subprocess.Popen(
            [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *map(str, entrypoint)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def get(self, port: str, path: str) -> int:
        """The HTTP status of a request that shows no token."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def free_ports(names: tuple[str, ...]) -> dict[str, int]:
    with ExitStack() as held:
        probes = {name: held.enter_context(socket.socket()) for name in names}
        for probe in probes.values():
            probe.bind(("127.0.0.1", 0))
        return {name: probe.getsockname()[1] for name, probe in probes.items()}


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of `ray job submit`, and what it has shown: the job's log."""
    log, _ = job.communicate(timeout=JOB_WITHIN_S)
    return job.returncode, log


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head`, as a process that ends with all it has started."""
    home = Path(tempfile.mkdtemp(prefix="mvrec-", dir="/tmp"))  # short: the sockets below it have long names
    (home / "token").write_text("0123456789abcdef" * 4)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "HOME": str(home),
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",  # a job's `python` is the one that Ray finds there
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at SIGTERM: nobody is waiting for answers of this node
    }
    ports = free_ports(PORTS)
    with (home / "start.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={home / 'ray'}"),
                *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--object-store-memory={100 << 20}"),
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for_start(process, home / "start.log")
        yield Cluster(environment, ports)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            shutil.rmtree(home, ignore_errors=True)


def wait_for_start(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.2)
    pytest.fail(f"ray start --head was not ready within {START_WITHIN_S} s:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tiny_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with absolute paths, since a job runs in a folder of its own."""
    folder = tmp_path_factory.mktemp("shared")
    tree = yaml.safe_load((ROOT / "pipelines" / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    for name in ("events", "items", "users"):
        tree["data"][name]["path"] = str(tiny_logs / f"{name}.csv")
    tree["model"]["text"]["path"] = str(tiny_encoder)
    tree["runs"] = str(folder / "runs")
    (folder / "店.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return folder / "店.yaml"


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, run: Path) -> dict[str, tuple[int, str]]:
    """prepare and train in one job; and meanwhile a train whose configuration is not there."""
    both = " && ".join(f"python -m pipelines.{verb} --config {run}" for verb in ("prepare", "train"))
    good = cluster.submit("sh", "-c", both)
    mistake = cluster.submit("python", "-m", "pipelines.train", "--config", run.with_name("none.yaml"))
    return {"mistake": ended(mistake), "good": ended(good)}


def test_the_dashboard_asks_for_the_token(cluster):
    assert cluster.get("dashboard-port", "/api/jobs/") == 401


def test_prepare_and_train_succeed_and_tell_their_progress(jobs):
    code, log = jobs["good"]
    assert (code, "succeeded" in log) == (0, True), log
    assert "prepare: " in log
    assert re.findall(r"^epoch +(\d)/2 +loss \d", log, re.MULTILINE) == ["1", "2"]


def test_the_checkpoint_of_a_job_recommends(jobs, run):
    recommender = Recommender.load(run.parent / "runs" / "tiny" / "checkpoint")
    (answer,) = recommender.recommend([Request(user_id="u000", k=3)])
    assert len(answer.items) == 3 and answer.rung == "history"


def test_a_mistake_fails_the_job_with_one_line(jobs):
    code, log = jobs["mistake"]
    assert code == 1 and "failed" in log
    (line,) = {line for line in log.splitlines() if line.startswith("error: ")}  # it is told twice
    assert "none.yaml" in line
    assert "Traceback" not in log
    assert "exit code 1" in log


def test_the_probes_of_the_manifests_need_no_token(jobs, cluster):
    ports = {"8265": "dashboard-port", "52365": "dashboard-agent-listen-port"}
    text = (ROOT / "docs" / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
    probes = set(re.findall(r"httpGet: {path: (\S+), port: (\d+)}", text))
    assert {port for _, port in probes} == set(ports)
    assert {cluster.get(ports[port], path) for path, port in probes} == {200}
