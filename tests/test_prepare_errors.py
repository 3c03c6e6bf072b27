"""Bad input to `prepare`: a sentence that says where, or a rejected row that is kept with its reason."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from mvrec_core.errors import DataError, MVRecError
from mvrec_core.reading import parse_config
from pipelines.prepare import prepare

pytestmark = pytest.mark.ray

HEADER = "user_id,item_id,timestamp\n"
GOOD = "u,a,1\nu,b,2\nu,c,3\n"


def attempt(tmp_path, log: str | bytes | None, name="log.csv", items=None, **events):
    path = tmp_path / name
    if log is not None:
        path.write_bytes(log if isinstance(log, bytes) else log.encode())
    data = {"events": {"path": str(path)} | events, "buckets": 2}
    views = {"id": {"kind": "id"}}
    if items is not None:
        (tmp_path / "items.csv").write_text(items, encoding="utf-8")
        data["items"] = {"path": str(tmp_path / "items.csv")}
        views["text"] = {"kind": "text", "columns": ["title"]}
    tree = {
        "name": "run",
        "runs": str(tmp_path / "runs"),
        "data": data,
        "views": views,
        "model": {"text": {"path": "x"}},
    }
    return prepare(parse_config(tree, "test"), log=lambda line: None)


def message(tmp_path, *args, **kwargs) -> str:
    with pytest.raises(MVRecError) as caught:
        attempt(tmp_path, *args, **kwargs)
    run = tmp_path / "runs" / "run"
    assert not run.exists() or not list(run.iterdir())  # nothing half done stays behind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rejected(tmp_path) -> list[tuple[str, int, str, str]]:
    files = sorted((tmp_path / "runs/run/prepared/rejected").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted((r["source"], r["row"], r["raw"], r["reason"]) for r in rows)


def test_missing_file(tmp_path, ray_local):
    assert "log.csv" in message(tmp_path, None)


@pytest.mark.parametrize("header", ["userid,item_id,timestamp\n", "item_id,timestamp,usr_id\n"])
def test_misnamed_column_names_the_nearest(tmp_path, ray_local, header):
    told = message(tmp_path, header + GOOD)
    assert "log.csv" in told and "'user_id'" in told and "did you mean 'us" in told


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl"])
def test_empty_file(tmp_path, ray_local, name):
    assert name in message(tmp_path, "", name)


def test_header_without_rows(tmp_path, ray_local):
    assert "log.csv" in message(tmp_path, HEADER)


def test_not_utf8(tmp_path, ray_local):
    told = message(tmp_path, HEADER.encode() + b"u,caf\xe9,1\n")
    assert "log.csv" in told and "UTF-8" in told


def test_items_not_utf8(tmp_path, ray_local):
    (tmp_path / "items.latin").write_bytes(b"item_id,title\na,caf\xe9\n")
    with pytest.raises(DataError, match="items.csv.*UTF-8"):
        (tmp_path / "log.csv").write_text(HEADER + GOOD)
        (tmp_path / "items.csv").write_bytes((tmp_path / "items.latin").read_bytes())
        data = {"events": {"path": str(tmp_path / "log.csv")}, "items": {"path": str(tmp_path / "items.csv")}}
        views = {"t": {"kind": "text", "columns": ["title"]}}
        tree = {"name": "run", "runs": str(tmp_path), "data": data, "views": views, "model": {"text": {"path": "x"}}}
        prepare(parse_config(tree, "test"), log=lambda line: None)


def test_all_rows_rejected_shows_the_first(tmp_path, ray_local):
    told = message(tmp_path, HEADER + "u,a,yesterday\nu,b,today\n")
    assert "log.csv" in told and "row 1" in told and "yesterday" in told and "all 2 rows" in told


def test_bad_rows_are_kept_with_their_reasons(tmp_path, ray_local):
    log = HEADER + "u,a,1\nu,b,abc\n,c,3\nu,d\nu,,5\nu,ف,6,7\nu,e,\nu,z,9\n"
    manifest = attempt(tmp_path, log)
    assert manifest["rows"]["events"] == {"in": 8, "kept": 2, "rejected": 6}
    rows = rejected(tmp_path)
    assert [row for _, row, _, _ in rows] == [2, 3, 4, 5, 6, 7]
    assert json.loads(rows[0][2]) == {"user_id": "u", "item_id": "b", "timestamp": "abc"}
    assert "timestamp" in rows[0][3] and "user_id" in rows[1][3] and "item_id" in rows[3][3] and "ف" in rows[4][2]
    assert sum(manifest["rejected"]["events"].values()) == 6


def test_bad_json_lines_cost_one_row_each(tmp_path, ray_local):
    lines = ['{"user_id": 1, "item_id": "a", "timestamp": 1}', "{oops", "[1]", '{"user_id": 1, "item_id": "b"}']
    lines += [
        '{"user_id": {"a": 1}, "item_id": "c", "timestamp": 3}',
        '{"user_id": "\\ud800", "item_id": "c", "timestamp": 3}',
    ]
    manifest = attempt(tmp_path, "\n".join(lines), "log.jsonl")
    assert manifest["rows"]["events"] == {"in": 6, "kept": 1, "rejected": 5}


def test_milliseconds_read_as_seconds(tmp_path, ray_local):
    told = message(tmp_path, HEADER + "u,a,1700000000000\n")
    assert "timestamp" in told and "1700000000000" in told


def test_duplicate_and_blank_items(tmp_path, ray_local):
    manifest = attempt(tmp_path, HEADER + GOOD, items="item_id,title\na,First\na,Second\n,None\nb,\n")
    assert manifest["rows"]["items"] == {"in": 4, "kept": 2, "rejected": 2}
    assert manifest["items"] == 2 and manifest["items_without_text"] == 1
    assert [(source, row) for source, row, _, _ in rejected(tmp_path)] == [("items", 1), ("items", 3)]
    shown = pq.read_table(tmp_path / "runs/run/prepared/items/display.parquet").to_pydict()
    assert shown == {"item_id": ["a", "b"], "value": ["Second", None]}


def test_user_with_one_event_trains_only(tmp_path, ray_local):
    manifest = attempt(tmp_path, HEADER + GOOD + "v,a,1\n")
    assert manifest["short_users"] == 1 and manifest["events"] == {"train": 2, "valid": 1, "test": 1}
