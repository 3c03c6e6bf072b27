"""Whether anything listens at an address, before a library tries for minutes."""

from __future__ import annotations

import contextlib
import re
import socket

WITHIN_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1")


def nobody_listens(address: str) -> bool:
    """Whether a TCP connection to host:port fails; False where that cannot be told, as of "auto" or ray://host:port.

    A loopback host may stand for this machine under its own name, as Ray takes it to.
    """
    place = re.fullmatch(r"\[?([^/\[\]]+?)\]?:(\d+)", address)
    if place is None or int(place[2]) > 65535:
        return False
    host, port = place[1], int(place[2])
    return not any(_answers(name, port) for name in {host, *(_own() if host in LOOPBACK else ())})


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=WITHIN_S):
            return True
    except OSError:
        return False


def _own() -> list[str]:
    """This machine's address by its name, and the one it sends from; a UDP socket is connected without a packet."""
    found = []
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of a network that is for documents alone
        found.append(probe.getsockname()[0])
    return found
