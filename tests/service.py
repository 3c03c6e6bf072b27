"""The service as a user starts it: a process of its own, Ray and HAProxy included."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest

ROOT = Path(__file__).parents[1]
START_WITHIN_S = 90
STOP_WITHIN_S = 30
GONE = 0  # instead of a status


def environment() -> dict[str, str]:
    """Without what would join the session's Ray, and in the poorest locale."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONIOENCODING"))}
    return {**outer, "LC_ALL": "C", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(checkpoint: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), *more]


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    lines: Queue[str]

    def wait_for(self, words: str, timeout_s: float) -> str:
        while True:
            line = self.lines.get(timeout=timeout_s)
            if words in line:
                return line


def start(checkpoint: Path, *more: str) -> Service:
    port = free_port()
    process = subprocess.Popen(
        command(checkpoint, "--port", str(port), "--threads", "1", *(more or ("--max-replicas", "1"))),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: Queue[str] = Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    return Service(process, f"http://127.0.0.1:{port}", lines)


def wait_until(true: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def running(checkpoint: Path, *more: str) -> Iterator[Service]:
    started = start(checkpoint, *more)
    try:
        started.wait_for("Ready: ", START_WITHIN_S)
        yield started
    except Empty:
        pytest.fail(f"the service was not ready within {START_WITHIN_S} s")
    finally:
        if started.process.poll() is None:
            started.process.send_signal(signal.SIGTERM)
            started.process.wait(STOP_WITHIN_S)
