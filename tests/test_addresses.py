"""Whether anything listens at an address, by real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import tiny

from mvrec_core.addresses import nobody_listens


@pytest.fixture
def closed() -> int:
    """A port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_that_listens_and_one_that_does_not(closed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not nobody_listens(f"127.0.0.1:{port}") and not nobody_listens(f"localhost:{port}")
    for address in (f"127.0.0.1:{closed}", f"localhost:{closed}", "no.such.host.invalid:6379", f"[::1]:{closed}"):
        assert nobody_listens(address), address


def test_a_loopback_address_may_stand_for_this_machine():
    with socket.create_server(("127.0.0.2", 0)) as server:  # which only its own address reaches
        port = server.getsockname()[1]
        assert nobody_listens(f"127.0.0.1:{port}") and not nobody_listens(f"127.0.0.2:{port}")


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:10001", "127.0.0.1", "a:b", "1.2.3.4:99999"])
def test_where_it_cannot_be_told(address):
    assert not nobody_listens(address)


@pytest.mark.parametrize("program", ["prepare", "serve"])
def test_a_wrong_ray_address_is_one_line(program, closed, tiny_logs, tmp_path, plain_checkpoint):
    paths = [f"data.{name}.path={tiny_logs / name}.csv" for name in ("events", "items", "users")]
    command = {
        "prepare": ["pipelines.prepare", "-c", str(tiny.CONFIG), f"runs={tmp_path}", *paths],
        "serve": ["serve", "--checkpoint", str(plain_checkpoint)],
    }[program]
    address = f"127.0.0.1:{closed}"
    done = subprocess.run(
        [sys.executable, "-m", *command], env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True
    )
    told = {
        "prepare": f"error: RAY_ADDRESS: no Ray cluster answers at '{address}'\n",
        "serve": f"error: cannot join the Ray that RAY_ADDRESS names, {address}: nothing listens there\n",
    }[program]
    assert (done.returncode, done.stderr) == (1, told)
