"""Checkpoints in a folder and in an object store: a real S3 server on this machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem
from s3_server import running
from starlette.testclient import TestClient

from mvrec_core import places
from mvrec_core.config import ServeConfig
from mvrec_core.errors import CheckpointError, ConfigError, MVRecError, ResourceError
from mvrec_core.recommender import Recommender
from mvrec_core.releases import KEPT, local, send
from mvrec_core.sealed import verify
from pipelines.cli import main as mvrec
from serve.alias import main, publish, read_alias, roll_back
from serve.app import Replica, application
from serve.settings import serve_settings


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """Where this machine keeps what it has read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mvrec" / "releases"


@pytest.fixture
def bucket(s3) -> str:
    """A folder of a bucket that is new, with the query that leads there."""
    name = f"bucket{time.time_ns()}"
    store, _ = FileSystem.from_uri(f"s3://{name}/{s3}&allow_bucket_creation=true")
    store.create_dir(name)
    return f"s3://{name}/发布{s3}"


def names(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def remove(uri: str) -> None:
    system, path, _ = places.place(uri)
    system.delete_file(path)


def test_a_release_is_the_checkpoint_byte_for_byte(bucket, plain_checkpoint, tmp_path, kept):
    version = verify(plain_checkpoint)["model_version"]
    for to in (str(tmp_path / "releases"), bucket):
        released = send(plain_checkpoint, to)
        assert released == places.below(to, version) and send(plain_checkpoint, to) == released
        assert names(local(released)) == names(plain_checkpoint)
    assert [path.name for path in kept.iterdir()] == [version]
    assert Recommender.load(released).model_version == version


def test_what_is_here_already_is_not_read_again(bucket, plain_checkpoint, kept):
    released = send(plain_checkpoint, bucket)
    first = local(released)
    remove(places.below(released, "model.safetensors"))
    assert local(released) == first
    (first / "users.parquet").write_bytes(b"x")  # a disk that forgets
    with pytest.raises(CheckpointError, match="model.safetensors: missing, but the manifest lists it"):
        local(released)
    assert list(kept.iterdir()) == []
    places.write(places.below(released, "model.safetensors"), (plain_checkpoint / "model.safetensors").read_bytes())
    assert names(local(released)) == names(plain_checkpoint)
    for number in range(KEPT + 2):  # others that were read before
        (kept / f"older{number}").mkdir()
        os.utime(kept / f"older{number}", (number, number))
    local(released)
    assert sorted(path.name for path in kept.iterdir()) == sorted([first.name, *(f"older{n}" for n in range(3, 6))])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda uri: remove(places.below(uri, "users.parquet")), "/users.parquet"),
        (lambda uri: places.write(places.below(uri, "users.parquet"), b"x"), "damaged: expected sha256"),
        (lambda uri: places.write(places.below(uri, "manifest.json"), b"{"), "damaged: expected JSON with"),
        (lambda uri: remove(places.below(uri, "manifest.json")), "no such checkpoint: it has no manifest.json"),
        (
            lambda uri: places.write(
                places.below(uri, "manifest.json"), b'{"model_version": "a", "files": {"../../x": ""}}'
            ),
            "damaged: expected names of files in the checkpoint",
        ),
        (
            lambda uri: places.write(places.below(uri, "manifest.json"), b'{"model_version": "../a", "files": {}}'),
            "damaged: expected names of files in the checkpoint",
        ),
    ],
)
def test_half_a_release_is_none(bucket, plain_checkpoint, kept, harm, told):
    released = send(plain_checkpoint, bucket)
    harm(released)
    with pytest.raises(CheckpointError) as error:
        local(released)
    assert told in str(error.value) and released.partition("?")[0] in str(error.value)
    assert "\n" not in str(error.value) and list(kept.iterdir()) == []


def test_places_that_are_none(bucket, plain_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, told in (
        ("s4://bucket/a", "cannot be read: Unrecognized filesystem type"),
        ("s3://me:secret@bucket/a", "expected no password in a URI"),
        (places.below(bucket, "nothing"), "no such checkpoint: it has no manifest.json"),
    ):
        with pytest.raises(MVRecError) as error:
            local(name)
        assert told in str(error.value) and "secret" not in str(error.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write a release to"):
        send(plain_checkpoint, str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="set XDG_CACHE_HOME"):
        local(places.below(bucket, "nothing"))


def test_an_alias_in_the_store_is_followed(bucket, plain_checkpoint, other_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("serve.live_file.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("serve.live_file.STORE_EVERY_S", 0.01)
    alias = places.below(bucket, "商店.json")
    one, two = (verify(path)["model_version"] for path in (plain_checkpoint, other_checkpoint))
    assert main(["publish", "--checkpoint", str(plain_checkpoint), "--alias", alias, "--to", bucket]) == 0
    told = capsys.readouterr().out
    assert told == f"{one}  100.0% of the users  {places.below(bucket, one)}\n"
    settings = ServeConfig(state_dir=str(tmp_path / "state"))
    application(alias, settings)
    with TestClient(Replica(alias, settings.model_dump()).__serve_build_asgi_app__()) as client:

        def answers(version: str) -> bool:
            body = {"user_id": "u003", "k": 3}
            return client.post("/v1/recommend", json=body).json()["model_version"] == version

        assert answers(one)
        publish(other_checkpoint, alias, to=bucket)
        assert read_alias(alias).main.checkpoint == places.below(bucket, two)
        for change, version in ((None, two), (roll_back, one)):
            if change is not None:
                change(alias)
            until = time.monotonic() + 30
            while not answers(version):
                assert time.monotonic() < until
                time.sleep(0.05)
    with pytest.raises(ConfigError, match="no such alias file"):
        read_alias(places.below(bucket, "nothing.json"))


def test_a_replica_starts_while_the_store_is_away(s3, s3_server, plain_checkpoint, tmp_path, monkeypatch, caplog):
    settings = ServeConfig(state_dir=str(tmp_path / "state")).model_dump()
    with running() as address:
        where = s3.replace(s3_server, address)
        store, _ = FileSystem.from_uri(f"s3://shop/{where}&allow_bucket_creation=true")
        store.create_dir("shop")
        alias = f"s3://shop/商店.json{where}"
        release = publish(plain_checkpoint, alias, to=f"s3://shop/发布{where}").main
        Replica(alias, settings)
    replica = Replica(alias, settings)
    assert replica.model_version == release.model_version and replica._follows
    assert "when this machine last read it" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Replica(alias, settings)


def test_a_checkpoint_of_the_store_is_served_and_asked_for_lists(bucket, plain_checkpoint, tmp_path, kept):
    released = send(plain_checkpoint, bucket)
    assert serve_settings(released, {"threads": 3}).threads == 3
    settings = ServeConfig(state_dir=str(tmp_path / "state"))
    with TestClient(Replica(released, settings.model_dump()).__serve_build_asgi_app__()) as client:
        assert client.get("/health/ready").json()["model_version"] == verify(plain_checkpoint)["model_version"]
    for checkpoint in (released, plain_checkpoint):
        out = tmp_path / f"{len(str(checkpoint))}.parquet"
        mvrec_ends(["recommend", "--checkpoint", str(checkpoint), "--stage", "test", "--k", "5", "--out", str(out)])
    one, two = sorted(tmp_path.glob("*.parquet"))
    assert one.read_bytes() == two.read_bytes()
    told = json.loads((local(released) / "manifest.json").read_text())
    assert told == json.loads((plain_checkpoint / "manifest.json").read_text())


def mvrec_ends(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mvrec(arguments)
    assert ended.value.code == 0
