"""The processes of bench_serve.py: the service under test, and the peers beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32
DEADLINE_S = 3.0
START_WITHIN_S = 120


@contextmanager
def serving(served: Path, folder: Path, replicas: int = 1) -> Iterator[tuple[int, psutil.Popen]]:
    port = free_port()
    how = "--alias" if served.is_file() else "--checkpoint"
    options = {
        how: served, "--port": port, "--threads": 1, "--min-replicas": replicas, "--max-replicas": replicas,
        "--max-batch-size": BATCH, "--deadline-s": DEADLINE_S, "--batch-wait-s": 0, "--state-dir": folder / "state",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    with started([sys.executable, "-m", "serve", *words]) as process:
        yield port, process


@contextmanager
def peer(script: str, *words: str) -> Iterator[tuple[int, psutil.Popen]]:
    port = free_port()
    with started([sys.executable, str(ROOT / "bench" / script), *words, str(port)]) as process:
        yield port, process


@contextmanager
def started(command: Sequence[str]) -> Iterator[psutil.Popen]:
    """A process that has said that it is ready; ended with what it started."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = psutil.Popen(
        command, stdout=subprocess.PIPE, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    )
    try:
        ready = threading.Event()
        threading.Thread(target=read, args=(process, ready), daemon=True).start()
        deadline = time.monotonic() + START_WITHIN_S
        while not ready.wait(0.1):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}: did not start")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except psutil.TimeoutExpired:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


def read(process: psutil.Popen, ready: threading.Event) -> None:
    for line in process.stdout or ():
        if line.startswith(b"Ready"):
            ready.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replicas(service: psutil.Popen) -> list[psutil.Process]:
    return [
        one
        for one in service.children(recursive=True)
        if one.cmdline() and one.cmdline()[0].startswith("ray::ServeReplica")
    ]


def cpu_s(process: psutil.Popen) -> float:
    """Of a process and all that it has started, since their beginning."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:2])
    return total
