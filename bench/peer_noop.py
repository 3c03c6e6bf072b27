"""A deployment that answers "{}" behind the ingress of `mvrec serve`: `python bench/peer_noop.py PORT`."""

from __future__ import annotations

import shutil
import sys
import threading

from serve.__main__ import Stopped, _connect, _stop_on_signals, _wait_until_reachable
from serve.ingress import prepare_environment

DEADLINE_S = 10.0


def main(port: int) -> None:
    folder = prepare_environment(port, DEADLINE_S)
    _connect(own_ray=True)
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(max_ongoing_requests=1000, logging_config={"enable_access_log": False})
    class Noop:
        async def __call__(self, request: Request) -> Response:
            await request.body()
            return Response(b"{}", media_type="application/json")

    _stop_on_signals()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(Noop.bind(), route_prefix="/")
        _wait_until_reachable(f"http://127.0.0.1:{port}")
        print("Ready", flush=True)
        threading.Event().wait()
    except Stopped:
        pass
    finally:
        serve.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
