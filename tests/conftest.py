from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["NUMBA_DISABLE_JIT"] = "1"  # ranx would compile for a minute what runs for a second

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from redis_server import RedisServer, needs_redis
from s3_server import running
from shelf import Shelf
from starlette.testclient import TestClient

from mvrec_core import checkpoint as checkpoints
from mvrec_core import ranking, training
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.model import MVRec
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request
from mvrec_core.sealed import seal
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers
from serve.api import create_api

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def tiny_config(tiny_encoder: Path, tiny_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    paths = [f"data.{name}.path={tiny_logs / name}.csv" for name in ("events", "items", "users")]
    return tiny.config(tiny_encoder, *paths, f"runs={tmp_path_factory.mktemp('runs')}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """host:port of an S3 server on this machine."""
    with running() as address:
        yield address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The query of URIs of its buckets; the environment has its credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"?endpoint_override={s3_server}&scheme=http"


# the routes in one process


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def client(shelf: Shelf) -> TestClient:
    return TestClient(create_api(shelf, max_in_flight=4, timeout_s=0.5), raise_server_exceptions=False)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer than a service should wait."""
    monkeypatch.setattr("serve.redis_client.TIMEOUT_S", 2.0)
    monkeypatch.setattr("serve.current.PATIENCE_S", 10.0)


# without Ray


@pytest.fixture(scope="session")
def plain_data() -> Data:
    return tiny.data()


@pytest.fixture(scope="session")
def plain_config(tiny_encoder: Path) -> Config:
    return tiny.config(tiny_encoder)


@pytest.fixture
def plain_model(plain_config: Config, plain_data: Data) -> MVRec:
    """Untrained, new for each test."""
    model = checkpoints.new_model(plain_config, plain_data, plain_data.shards(plain_config))
    model.text.refresh()
    return model


@pytest.fixture(scope="session")
def plain_checkpoint(plain_config: Config, plain_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for the two epochs of the configuration, in this process."""
    histories = plain_data.histories(plain_config)
    model = checkpoints.new_model(plain_config, plain_data, Shards.whole(histories))
    for _ in training.fit(model, Shards.whole(histories), plain_config, Workers()):
        pass
    directory = tmp_path_factory.mktemp("plain") / "checkpoint"
    checkpoints.save(directory, model, plain_data, ranking.catalogue(model)[1], {"valid": {}})
    return directory


@pytest.fixture(scope="session")
def other_checkpoint(plain_config: Config, plain_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same data, untrained, so that its lists are others."""
    config = plain_config.model_copy(update={"seed": 1})
    model = checkpoints.new_model(config, plain_data, plain_data.shards(config))
    model.text.refresh()
    directory = tmp_path_factory.mktemp("other") / "checkpoint"
    checkpoints.save(directory, model, plain_data, ranking.catalogue(model)[1], {"valid": {}})
    return directory


@pytest.fixture(scope="session")
def broken_checkpoint(plain_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole and sealed, but its vectors are no numbers."""
    directory = tmp_path_factory.mktemp("broken") / "checkpoint"
    shutil.copytree(plain_checkpoint, directory)
    vectors = np.load(directory / "item_vectors.npy")
    np.save(directory / "item_vectors.npy", np.full_like(vectors, np.nan))
    (directory / "manifest.json").unlink()
    seal(directory)
    return directory


@pytest.fixture(scope="session")
def plain_recommender(plain_checkpoint: Path) -> Recommender:
    return Recommender.load(plain_checkpoint)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of a test file's own."""
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    yield started
    started.kill()


@pytest.fixture(params=["file", pytest.param("redis", marks=needs_redis)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What replicas have to be told to share what they keep."""
    state = {"state_dir": str(tmp_path / "state")}
    if request.param == "file":
        yield state
        return
    server = RedisServer(tmp_path)
    yield {"redis_url": server.url, **state}
    server.kill()


# with Ray


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    import ray

    from pipelines.cluster import connect

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    connect(min_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_prepared(tiny_config: Config, ray_local: None) -> dict[str, Any]:
    """The manifest of the prepared data of tiny_config."""
    from pipelines.prepare import prepare

    return prepare(tiny_config, log=lambda line: None)


@pytest.fixture(scope="session")
def checkpoint(tiny_config: Config, tiny_prepared: dict[str, Any], ray_local: None) -> Path:
    from pipelines.train import train

    return train(tiny_config, log=lambda line: None)


@pytest.fixture
def ask(plain_recommender: Recommender) -> Callable[..., Any]:
    """A request's values -> its answer."""

    def one(*args: Any, **kwargs: Any) -> Any:
        return plain_recommender.recommend([Request(*args, **kwargs)])[0]

    return one
