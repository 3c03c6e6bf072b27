"""Which raw files are found, here and in an object store, and what is known of them without reading a row."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSystem
from raw_files import NAMES, ROWS, numbered, read, refusal, write

from mvrec_core.data import Source
from pipelines import locations, raw


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    names = [
        "b.csv",
        "a.csv.gz",
        "x/c.jsonl",
        "x/y/d.TSV",
        "x/日志.parquet",
        "note.txt",
        "_SUCCESS",
        ".a.csv",
        "_old/e.csv",
    ]
    for name in [*names, "x/.crc/f.csv", "z[1].csv"]:
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("logs", ["a.csv.gz", "b.csv", "x/c.jsonl", "x/y/d.TSV", "x/日志.parquet", "z[1].csv"]),
        ("logs/x/", ["x/c.jsonl", "x/y/d.TSV", "x/日志.parquet"]),
        ("logs/*.csv", ["b.csv", "z[1].csv"]),
        ("logs/*", ["a.csv.gz", "b.csv", "note.txt", "x/c.jsonl", "x/y/d.TSV", "x/日志.parquet", "z[1].csv"]),
        ("logs/**/*.[jp]*", ["x/c.jsonl", "x/日志.parquet"]),
        ("logs/**/x/**/?.*", ["x/c.jsonl", "x/y/d.TSV"]),
        ("l*/x", ["x/c.jsonl", "x/y/d.TSV", "x/日志.parquet"]),
        ("logs/_*/*.csv", ["_old/e.csv"]),
        ("logs/z[1].csv", ["z[1].csv"]),
        ("logs/_SUCCESS", ["_SUCCESS"]),
        (("logs/x/y", "logs/b.csv", "logs/[ab]*"), ["x/y/d.TSV", "b.csv", "a.csv.gz"]),
    ],
)
def test_find(tree, path, found):
    assert locations.find(Source(path=path), "data.events") == [f"logs/{name}" for name in found]


def test_find_in_the_working_folder_and_by_absolute_path(tree, monkeypatch):
    monkeypatch.chdir(tree / "logs")
    assert locations.find(Source(path="*.csv"), "data.events") == ["b.csv", "z[1].csv"]
    assert locations.find(Source(path=f"{tree}/*/b.csv"), "data.events") == [f"{tree}/logs/b.csv"]


def test_find_by_uri_writes_uris(tree):
    (tree / "logs/x/50% off?.csv").touch()
    root = f"file://{tree}/logs"
    assert locations.find(Source(path=f"{root}/x/*.csv"), "k") == [f"{root}/x/50%25 off%3F.csv"]
    assert locations.find(Source(path=f"{root}/x/50%25%20off%3F.csv"), "k") == [f"{root}/x/50%25%20off%3F.csv"]
    assert locations.find(Source(path=f"{root}/x/?.jsonl"), "k") == [f"{root}/x/c.jsonl"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("logs/nothing.csv", "data.items.path: no such file: 'logs/nothing.csv'"),
        ("logs/*.nothing", "data.items.path: no such file: 'logs/*.nothing'"),
        ("none/**/*.csv", "data.items.path: no such file: 'none/**/*.csv'"),
        ("logs/_old/..", "expected files that end in .csv, .tsv, .jsonl, .ndjson, .parquet, found none"),
        ("ftp://host/a.csv", "data.items.path: 'ftp://host/a.csv' cannot be listed: Unrecognized filesystem type"),
        ("s3://key:secret@bucket/a.csv", "s3://...: expected no password in a URI"),
    ],
)
def test_nothing_to_find(tree, path, told):
    for file in (*tree.glob("logs/*.*"), *tree.glob("logs/x/**/*.*")):
        if path.endswith("..") and file.is_file():
            file.unlink()
    message = refusal(locations.find, Source(path=path), "data.items")
    assert told in message and "secret" not in message


def test_size_and_fingerprint_are_those_of_the_stored_file(tmp_path):
    file = write(tmp_path / "log.csv.gz")
    stored = Path(file).read_bytes()
    assert locations.size(file) == locations.size(f"file://{file}") == len(stored)
    assert locations.fingerprint(f"file://{file}") == (len(stored), hashlib.sha256(stored).hexdigest())


@pytest.fixture
def bucket(s3, tmp_path) -> str:
    """The query of URIs of a bucket "logs" with a log in two formats."""
    store, _ = FileSystem.from_uri(f"s3://logs/{s3}&allow_bucket_creation=true")
    store.create_dir("logs")
    write(tmp_path / "a.csv.gz")
    pq.write_table(
        pa.table({"user_id": [2**53 + 1, None], "item_id": ["甲", "b"], "timestamp": [1, 2]}), tmp_path / "b.parquet"
    )
    for local, key in (
        ("a.csv.gz", "2017/日志 1.csv.gz"),
        ("b.parquet", "2017/01/b.parquet"),
        ("a.csv.gz", "2017/_SUCCESS"),
    ):
        with store.open_output_stream(f"logs/{key}", compression=None) as stream:
            stream.write((tmp_path / local).read_bytes())
    return s3


def test_s3_named_by_the_uri(bucket):
    text, table = f"s3://logs/2017/日志 1.csv.gz{bucket}", f"s3://logs/2017/01/b.parquet{bucket}"
    assert locations.find(Source(path=f"s3://logs/2017{bucket}"), "k") == [table, text]
    assert locations.find(Source(path=f"s3://logs/**/*.parquet{bucket}"), "k") == [table]
    assert locations.find(Source(path=f"s3://logs/20?7/*.gz{bucket}"), "k") == [text]
    assert locations.find(Source(path=text), "k") == [text]
    assert read(text) == numbered(ROWS)
    assert read(table) == [(1, 2**53 + 1, "甲", 1), (2, None, "b", 2)]
    assert raw.take(table, Source(path=table), [2]) == ['{"user_id":null,"item_id":"b","timestamp":2}']
    assert [piece.file for piece in raw.pieces([Source(path="")], [[text, table]])] == [text, table]
    assert locations.fingerprint(text)[0] == locations.size(text)
    raw.check_columns(text, Source(path=text), NAMES, "k")
    told = refusal(locations.find, Source(path=f"s3://logs/2018{bucket}"), "data.events")
    assert "no such file: 's3://logs/2018" in told
    assert "cannot be read" in refusal(read, f"s3://logs/2018.csv{bucket}")


def test_s3_named_by_the_environment(bucket, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    files = locations.find(Source(path="s3://logs/2017/"), "k")
    assert files == ["s3://logs/2017/01/b.parquet", "s3://logs/2017/日志 1.csv.gz"]
    assert read(files[1]) == numbered(ROWS)
