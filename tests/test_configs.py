"""The configurations that come with the package, as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvrec_core.reading import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))
LOGS = ROOT.parent / "shared" / "data"


def needs(folder):
    there = (LOGS / folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"needs the Parquet files of {folder} in {LOGS / folder}")


def prepared(name, folder, tables, tmp_path):
    """The manifest of a configuration with its tables read from LOGS."""
    from pipelines.prepare import prepare

    paths = [f"data.{table}.path={LOGS / folder / table}.parquet" for table in tables]
    config = load_config(ROOT / "pipelines" / "configs" / f"{name}.yaml", [f"runs={tmp_path}", *paths])
    return prepare(config, log=lambda line: None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_parses_and_is_named_as_its_file(path):
    config = load_config(path)
    assert config.name == path.stem
    sources = [*config.data.events, *filter(None, (config.data.items, config.data.users))]
    assert all(name.startswith("data/") for source in sources for name in source.paths)


@pytest.mark.ray
@needs("ml-1m")
def test_movielens_1m(tmp_path, ray_local):
    manifest = prepared("movielens-1m", "ml-1m", ("events", "items", "users"), tmp_path)
    assert (manifest["users"], manifest["items"], manifest["short_users"]) == (6040, 3416, 0)
    assert manifest["events"] == {"train": 987531, "valid": 6040, "test": 6040}
    assert manifest["rows"]["events"] == {"in": 999611, "kept": 999611, "rejected": 0}
    assert manifest["rows"]["users"] == {"in": 6040, "kept": 6040, "rejected": 0}
    assert {view["missing"] + view["unreadable"] for view in manifest["views"].values()} == {0}


@pytest.mark.ray
@needs("amazon-cn")
def test_amazon_cn(tmp_path, ray_local):
    manifest = prepared("amazon-cn", "amazon-cn", ("events", "items"), tmp_path)
    assert (manifest["users"], manifest["items"], manifest["short_users"]) == (8923, 96, 2486)
    assert manifest["events"] == {"train": 31978, "valid": 6437, "test": 6437}
    assert manifest["rows"]["events"] == {"in": 44852, "kept": 44852, "rejected": 0}
    assert manifest["vocabulary"] == {"categories": 79}
    assert {view["missing"] + view["unreadable"] for view in manifest["views"].values()} == {0}
