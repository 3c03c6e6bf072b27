"""`prepare` end to end, by what it writes: only files and the manifest are looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import EVENTS, config_of, histories, run, write_events

from mvrec_core.config import Config
from mvrec_core.reading import load_config

pytestmark = pytest.mark.ray


def column(config: Config, name: str) -> list:
    return pq.read_table(config.run_dir / "prepared" / f"{name}.parquet").to_pydict()["value"]


def test_every_file_and_number_of_a_small_run(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    config = config_of(tmp_path, tmp_path / "logs")
    manifest = run(config)
    second = 1_000_000
    assert histories(config) == {  # ties at 100 keep the order of the file
        "u1": [
            ("a", 90 * second, 0, None),
            ("喜剧", 100 * second, 0, 5.0),
            ("b", 100 * second, 1, 4.0),
            ("مرحبا", 100 * second, 2, 2.0),
        ],
        "u2": [("a", 40 * second, 0, None), ("b", 50 * second, 1, 3.0), ("zz", 60 * second, 2, 2.0)],
        "مريم": [("b", 7 * second, 0, 1.0)],
    }
    root = config.run_dir / "prepared"
    # zz is only in a test event and not in the items file: it is not in the catalogue
    assert pq.read_table(root / "items/id.parquet").to_pydict() == {"item_id": ["a", "b", "喜剧", "مرحبا"]}
    assert column(config, "items/text") == [
        "title: 玩具总动员 genres: x|y",
        None,
        "title: مرحبا بالعالم genres: y",
        "title: Last",
    ]
    assert column(config, "items/genres") == [["x", "y"], None, ["y"], None]
    assert column(config, "items/year") == [1995.0, None, 1997.0, None]
    assert column(config, "items/display")[::2] == ["玩具总动员", "مرحبا بالعالم"]
    assert column(config, "users/job") == [["baker"], None]
    fitted = json.loads((root / "fitted.json").read_text(encoding="utf-8"))
    assert fitted["genres"] == {"kind": "category", "values": ["x", "y"]}
    assert fitted["year"] == {"kind": "number", "mean": 1996.0, "std": 1.0, "count": 2}
    assert fitted["rating"] == {"kind": "number", "mean": 3.0, "std": 2.0, "count": 2}  # train events: 5 and 1
    assert fitted["job"] == {"kind": "category", "values": ["baker"]}
    assert manifest["events"] == {"train": 4, "valid": 2, "test": 2}
    expected = {"users": 3, "items": 4, "short_users": 1, "items_without_text": 1, "unknown_items": 1, "buckets": 3}
    assert {key: manifest[key] for key in expected} == expected
    assert {name: view["unreadable"] for name, view in manifest["views"].items() if view["unreadable"]} == {
        "year": 1,
        "rating": 1,
    }
    assert manifest["rows"]["events"] == {"in": 8, "kept": 8, "rejected": 0}
    assert len(list((root / "events").iterdir())) == 3
    assert json.loads((root / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert [entry.name for entry in config.run_dir.iterdir()] == ["prepared"]


def test_content_hash_does_not_depend_on_files_or_runs(tmp_path, ray_local):
    rows = [(f"u{i % 37}", f"i{i % 11}", str(i // 5), str(i % 6)) for i in range(600)]
    hashes = set()
    for name, parts in (("one", 1), ("again", 1), ("five", 5)):
        write_events(tmp_path / name, parts, rows)
        hashes.add(run(config_of(tmp_path, tmp_path / name, name))["content_hash"])
    assert len(hashes) == 1
    write_events(tmp_path / "other", 1, [*rows[:-1], ("u1", "i1", "9999", "1")])
    assert run(config_of(tmp_path, tmp_path / "other", "other"))["content_hash"] not in hashes


def test_temporal_split_cuts_at_the_instants(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    split = {"kind": "temporal", "valid_from": "1970-01-01T00:01:00Z", "test_from": "1970-01-01T00:01:40Z"}
    config = config_of(tmp_path, tmp_path / "logs", split=split)
    assert run(config)["events"] == {"train": 3, "valid": 2, "test": 3}
    assert [(item, part) for item, _, part, _ in histories(config)["u1"]] == [
        ("a", 1),
        ("喜剧", 2),
        ("b", 2),
        ("مرحبا", 2),
    ]
    assert [part for _, _, part, _ in histories(config)["u2"]] == [0, 0, 1]


@pytest.mark.parametrize("form", ["jsonl", "tsv", "parquet"])
def test_every_format_gives_the_same_content(tmp_path, ray_local, form):
    write_events(tmp_path / "logs")
    wanted = run(config_of(tmp_path, tmp_path / "logs", "csv"))["content_hash"]
    names = ["user_id", "item_id", "timestamp", "rating"]
    path = tmp_path / f"log.{form}"
    if form == "parquet":
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*EVENTS, strict=True)), strict=True))), path)
    elif form == "tsv":
        path.write_text("\n".join("\t".join(row) for row in [names, *EVENTS]) + "\n", encoding="utf-8")
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in EVENTS]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run(config_of(tmp_path, tmp_path, form, events={"path": str(path)}))["content_hash"] == wanted


def test_integer_ids_above_2_to_53_are_exact(tmp_path, ray_local):
    ids = [2**53 + 1, 2**53 + 3, 2**53 + 1]
    log = {"user_id": ids, "item_id": [1, 2, 3], "timestamp": [1, 2, 3], "rating": [1, 1, 1]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    config = config_of(tmp_path, tmp_path, events={"path": str(tmp_path / "log.parquet")})
    run(config)
    assert sorted(histories(config)) == ["9007199254740993", "9007199254740995"]


def test_the_deviation_of_large_numbers_is_exact(tmp_path, ray_local):
    write_events(tmp_path / "logs", 1, [(f"u{i}", "a", "1", str(10**9 + i)) for i in range(3)])
    config = config_of(tmp_path, tmp_path / "logs")
    run(config)
    fitted = json.loads((config.run_dir / "prepared/fitted.json").read_text(encoding="utf-8"))["rating"]
    assert (fitted["mean"], fitted["std"]) == (1e9 + 1, pytest.approx((2 / 3) ** 0.5, rel=1e-9))


def test_a_file_that_two_patterns_name_is_read_once(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    path = [str(tmp_path / "logs" / "*.csv"), str(tmp_path / "logs" / "log-00.csv")]
    assert run(config_of(tmp_path, tmp_path, events={"path": path}))["rows"]["events"]["in"] == len(EVENTS)


def test_a_second_run_replaces_the_first(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    config = config_of(tmp_path, tmp_path / "logs")
    first = run(config)
    assert run(config) | {"seconds": 0} == first | {"seconds": 0}
    assert [entry.name for entry in config.run_dir.iterdir()] == ["prepared"]


@pytest.mark.skipif(not Path("data/ml-100k/ml-100k.inter").exists(), reason="data/ml-100k is not there")
def test_movielens_100k(tmp_path, ray_local):
    config = load_config("pipelines/configs/movielens-100k.yaml", [f"runs={tmp_path}"])
    manifest = run(config)
    assert (manifest["users"], manifest["items"], manifest["short_users"]) == (943, 1682, 0)
    assert manifest["events"] == {"train": 98114, "valid": 943, "test": 943}
    assert manifest["rows"]["events"] == {"in": 100000, "kept": 100000, "rejected": 0}
