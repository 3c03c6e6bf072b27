"""`python -m serve --checkpoint DIR`, or --alias FILE: serve a checkpoint, or those that a file names, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from types import FrameType
from typing import Any

from mvrec_core.addresses import nobody_listens
from mvrec_core.config import ServeConfig
from mvrec_core.errors import CheckpointError, MVRecError, ResourceError
from serve.ingress import answer_within_s, check_port, prepare_environment
from serve.keys import read_keys
from serve.last_known import last_known
from serve.settings import serve_settings

REACHABLE_WITHIN_S = 30.0
OBJECT_STORE_BYTES = 100 * 2**20  # requests do not pass through it


class Stopped(BaseException):
    """Ctrl-C or a SIGTERM, also while Ray is still starting."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what is None was not given and comes from the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="Serve a checkpoint over HTTP. Defaults are those of the checkpoint's config.json.",
    )
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--checkpoint", metavar="DIR", help="a directory that training has written, or its URI")
    served.add_argument("--alias", metavar="FILE", help="or URI: what `mvrec publish` has written; followed")
    parser.add_argument("--host", help="where to listen; 0.0.0.0 for every interface")
    parser.add_argument("--port", type=int)
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads, and cores, of a replica")
    parser.add_argument("--min-replicas", type=int, metavar="N")
    parser.add_argument("--max-replicas", type=int, metavar="N")
    parser.add_argument("--upscale-s", type=float, metavar="S", help="of many requests before a replica is added")
    parser.add_argument("--downscale-s", type=float, metavar="S", help="of few before one is taken away")
    parser.add_argument("--max-batch-size", type=int, metavar="N", help="requests that are answered together")
    parser.add_argument("--rules", metavar="FILE", help="what must not be recommended, and why; read when it changes")
    parser.add_argument("--request-log", metavar="FILE", help="a line of JSON for each request, without ids and text")
    parser.add_argument("--api-keys", metavar="FILE", help="who may ask: keys, one a line; or set MVREC_API_KEYS")
    parser.add_argument("--deadline-s", type=float, metavar="S", help="of an answer; what cannot keep it is refused")
    parser.add_argument("--batch-wait-s", type=float, metavar="S", help="how long a batch waits to fill")
    parser.add_argument(
        "--redis-url", metavar="URL", help="keep live events, items and answers there: redis://host:6379/0"
    )
    parser.add_argument(
        "--state-dir", metavar="DIR", help="without Redis: keep live events and items there, on a local disk"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 after Ctrl-C or SIGTERM, 1 with one line on stderr after a mistake."""
    given = vars(arguments(argv))
    checkpoint, alias = given.pop("checkpoint"), given.pop("alias")
    own_ray = not os.environ.get("RAY_ADDRESS")
    folder = None
    _stop_on_signals()
    try:
        settings = serve_settings(checkpoint or last_known(alias).main.checkpoint, given)
        if own_ray:  # elsewhere ports and environment are those of the cluster's nodes
            read_keys(settings.api_keys)  # what is wrong with them shows here, at once
            check_port(settings.host, settings.port)
            folder = prepare_environment(settings.port, settings.deadline_s)
            if folder is None:
                print(
                    "warning: without HAProxy requests pass Ray Serve's Python proxy, which is slower", file=sys.stderr
                )
        run(checkpoint or alias, settings, own_ray)
    except MVRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("Stopped.", flush=True)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def run(served: str, settings: ServeConfig, own_ray: bool) -> None:
    """Serves until Stopped, on a Ray of its own that ends with it or on the one that RAY_ADDRESS names."""
    import ray  # only here: Ray reads the environment that main has set
    from ray import serve  # noqa: F401  (sets up the loggers that are hushed next)

    print("Starting Ray ..." if own_ray else f"Joining Ray at {os.environ['RAY_ADDRESS']} ...", flush=True)
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _connect(own_ray)
    _stop_on_signals()  # again: Ray has put a handler of its own in place, which prints a stack and exits
    try:
        _check_cores(settings, ray.cluster_resources().get("CPU", 0))
        _deploy(served, settings, own_ray)
        address = f"http://{_reachable_host(settings.host)}:{settings.port}"
        _wait_until_reachable(address)
        print(f"Ready: {address} (a page for people), {address}/docs (the interface). Ctrl-C stops.", flush=True)
        threading.Event().wait()
    finally:
        _ignore_signals()  # the second Ctrl-C of the impatient must not leave processes behind
        _shut_down(own_ray)


def _connect(own_ray: bool) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if own_ray:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        return
    address = os.environ["RAY_ADDRESS"]
    if nobody_listens(address):
        raise ResourceError(f"cannot join the Ray that RAY_ADDRESS names, {address}: nothing listens there")
    try:
        ray.init(address="auto", **quiet)
    except (ConnectionError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(f"cannot join the Ray that RAY_ADDRESS names, {address}: {reason}") from None


def _shut_down(own_ray: bool) -> None:
    import ray
    from ray import serve

    from serve.app import APP_NAME

    with contextlib.redirect_stdout(None):  # Ray reports the death of its own controller there
        if own_ray:
            serve.shutdown()
        else:
            serve.delete(APP_NAME)  # other applications may live on that cluster
        ray.shutdown()


def _deploy(served: str, settings: ServeConfig, own_ray: bool) -> None:
    from ray import serve

    from serve.app import APP_NAME, application

    print(f"Loading {served} ...", flush=True)
    serve.start(
        proxy_location="HeadOnly" if own_ray else "EveryNode",
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": answer_within_s(settings.deadline_s),
        },
    )
    try:
        serve.run(application(served, settings), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        reports = [deployment.message for deployment in deployments if deployment.message] or [str(error)]
        raise _reason(served, reports[0]) from error


def _wait_until_reachable(address: str) -> None:
    """The application is up before the proxy has heard of it."""
    deadline = time.monotonic() + REACHABLE_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health/ready", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ResourceError(f"the service is up but {address} does not answer: {error}") from error
            time.sleep(0.1)


def _reachable_host(host: str) -> str:
    """Where a browser on this machine finds a server that listens on `host`."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return everywhere.get(host, f"[{host}]" if ":" in host else host)


def _check_cores(settings: ServeConfig, cores: float) -> None:
    """Ray would wait for missing cores for ever, with nothing but a warning in its log."""
    needed = settings.min_replicas * settings.threads
    if needed > cores:
        raise ResourceError(
            f"{settings.min_replicas} replicas of {settings.threads} threads need {needed} cores, Ray has {cores:g}; "
            "lower --min-replicas or --threads"
        )


def _reason(served: str, report: str) -> MVRecError:
    """The one sentence in Serve's report of a failed deployment, which is mostly traceback."""
    ours = re.search(r"mvrec_core\.errors\.(\w+): (.+)", report)
    if ours:
        return CheckpointError(ours[2])
    last = [line.strip() for line in report.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b.*: ", line)]
    return CheckpointError(f"{served}: cannot be served: {last[-1] if last else ' '.join(report.split())[:300]}")


def _stop_on_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
