"""What `prepare` leaves out, how it splits, and that test rows decide nothing: exact tables."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs import EVENTS, config_of, contents, histories, rejected, run, write_events

from mvrec_core.errors import ConfigError

pytestmark = pytest.mark.ray

TRAINING_READS = ("events/", "views/", "items/", "users/", "fitted.json", "views.json")


def sequence(config) -> dict[str, str]:
    """user -> its items, "|" before validation, "/" before test."""
    told = {}
    for user, events in histories(config).items():
        parts = ["".join(item for item, _, split, _ in events if split == one) for one in range(3)]
        told[user] = f"{parts[0]}|{parts[1]}/{parts[2]}"
    return told


def test_each_reason_is_counted_and_kept(tmp_path, ray_local):
    rows = [
        ("u", "a", "1", "5"),
        ("u", "a", "1", "5"),  # 2: a duplicate
        ("u", "a", "2", "4"),  # 3: a repeat
        ("u", "b", "3", "1"),
        ("u", "c", "4", "2"),
        ("u", "d", "5", "2"),
        ("v", "a", "1", "9"),  # 7: out of range
        ("", "a", "1", "2"),  # 8: invalid
        ("u", "电影", "0", "3"),  # 9: older than the newest two
    ]
    write_events(tmp_path / "logs", 2, rows)
    clean = {"duplicates": True, "repeats": True, "ranges": {"rating": {"max": 8}}, "max_history": 2}
    config = config_of(tmp_path, tmp_path / "logs", clean=clean)
    manifest = run(config)
    assert sequence(config) == {"u": "ab|c/d"}
    assert manifest["rows"]["events"] == {"in": 9, "kept": 4, "rejected": 5}
    assert manifest["rejected"]["events"] == {
        "duplicate row": 1,
        "older than the newest 2 train events": 1,
        "rating is not in any to 8": 1,
        "the item of the event before": 1,
        "user_id is missing": 1,
    }
    found = [(file, row, reason) for source, file, row, reason, _ in rejected(config) if source == "events"]
    assert found == [
        ("log-00.csv", 2, "duplicate row"),
        ("log-00.csv", 3, "the item of the event before"),
        ("log-01.csv", 2, "rating is not in any to 8"),
        ("log-01.csv", 3, "user_id is missing"),
        ("log-01.csv", 4, "older than the newest 2 train events"),
    ]
    whole = [json.loads(raw) for source, *_, raw in rejected(config) if source == "events"]
    assert whole[-1] == {"user_id": "u", "item_id": "电影", "timestamp": "0", "rating": "3"}


def test_max_history_before_the_shuffle_leaves_what_it_leaves_after(tmp_path, ray_local):
    rows = [(f"u{n % 3}", f"i{n}", str(n * 7 % 50), "") for n in range(60)]
    write_events(tmp_path / "logs", 4, rows)
    early = run(config_of(tmp_path, tmp_path / "logs", "early", clean={"max_history": 5}))
    late = run(config_of(tmp_path, tmp_path / "logs", "late", clean={"max_history": 5, "duplicates": True}))
    assert early["content_hash"] == late["content_hash"]
    assert early["rejected"]["events"] == late["rejected"]["events"] == {"older than the newest 5 train events": 39}


@pytest.mark.parametrize(
    ("over", "expected"),
    [  # train events: u1 a b, u2 a b, u3 a; of all events c has three
        ("train", {"u1": "ab|/", "u2": "ab|/"}),
        ("all", {"u1": "a|b/c", "u2": "a|b/c", "u3": "a|b/c"}),
    ],
)
def test_the_core(tmp_path, ray_local, over, expected):
    rows = [(user, item, str(n), "") for user in ("u1", "u2") for n, item in enumerate("abc" + user[1])]
    rows += [("u3", item, str(n), "") for n, item in enumerate("abc")]
    write_events(tmp_path / "logs", 2, rows)
    clean = {"core": {"users": 2, "items": 2, "over": over}}
    config = config_of(tmp_path, tmp_path / "logs", clean=clean)
    manifest = run(config)
    assert sequence(config) == expected
    assert manifest["rows"]["events"]["kept"] == sum(len(told) - 2 for told in expected.values())


def test_last_n(tmp_path, ray_local):
    write_events(tmp_path / "logs", 1, [("u", item, str(n), "") for n, item in enumerate("abcdef")])
    config = config_of(tmp_path, tmp_path / "logs", split={"kind": "last_n", "n": 2})
    assert run(config)["events"] == {"train": 2, "valid": 2, "test": 2}
    assert sequence(config) == {"u": "ab|cd/ef"}


@pytest.mark.parametrize(
    "split", [None, {"kind": "temporal", "valid_from": "1970-01-01T00:00:45", "test_from": "1970-01-01T00:00:55"}]
)
def test_other_test_rows_change_no_byte_that_training_reads(tmp_path, ray_local, split):
    split = split or {"kind": "leave_one_out"}
    write_events(tmp_path / "logs")
    config = config_of(tmp_path, tmp_path / "logs", "one", split=split)
    run(config)
    other = [
        (u, "canary" if t in ("60", "100.0") else i, t, "4" if t in ("60", "100.0") else r) for u, i, t, r in EVENTS
    ]
    if split["kind"] == "temporal":
        other += [("newcomer", "canary", "70", "1")]
    write_events(tmp_path / "other", 1, other)
    changed = config_of(tmp_path, tmp_path / "other", "two", split=split)
    run(changed)
    one, two = (contents(each.run_dir / "prepared") for each in (config, changed))
    assert any("canary" in str(events) for events in histories(changed).values())
    reads = {name for name in one | two if name.startswith(TRAINING_READS)}
    assert {"events/bucket=0000/part-0.parquet", "views/rating/bucket=0000/part-0.parquet", "fitted.json"} <= reads
    assert {name: one.get(name) for name in reads} == {name: two.get(name) for name in reads}
    assert not any(b"canary" in two[name] for name in reads)
    assert one["manifest.json"] != two["manifest.json"]


def test_several_kinds_of_events_make_one_history(tmp_path, ray_local):
    (tmp_path / "views").mkdir()
    with gzip.open(tmp_path / "views" / "day.csv.gz", "wt", encoding="utf-8") as file:
        file.write("who,what,at\nu,a,1970-01-01T00:00:01Z\nu,b,1970-01-01T08:00:03+08:00\n")
    pq.write_table(
        pa.table({"user_id": ["u", "u"], "item_id": ["a", "c"], "ms": [2000, 4000], "price": [9.5, None]}),
        tmp_path / "buys.parquet",
    )
    sources = [
        {
            "path": str(tmp_path / "views"),
            "columns": {"user_id": "who", "item_id": "what", "timestamp": "at", "rating": None},
            "constants": {"action": "view"},
            "timestamp_unit": "iso",
        },
        {
            "path": str(tmp_path / "buys.parquet"),
            "columns": {"timestamp": "ms", "rating": "price"},
            "constants": {"action": "buy"},
            "timestamp_unit": "ms",
        },
    ]
    config = config_of(tmp_path, tmp_path, events=sources)
    action = {"kind": "category", "level": "event", "column": "action"}
    config = config.model_validate(config.model_dump() | {"views": config.model_dump()["views"] | {"action": action}})
    manifest = run(config)
    assert [(item, rating) for item, _, _, rating in histories(config)["u"]] == [
        ("a", None),
        ("a", 9.5),
        ("b", None),
        ("c", None),
    ]
    assert manifest["vocabulary"]["action"] == 2
    assert manifest["events"] == {"train": 2, "valid": 1, "test": 1}


def test_a_cut_that_is_no_instant(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    with pytest.raises(ConfigError, match="data.clean.since: expected an ISO-8601 instant, found 'soon'"):
        run(config_of(tmp_path, tmp_path / "logs", clean={"since": "soon"}))


@pytest.mark.parametrize("buckets", [None, 50])
def test_skew(tmp_path, ray_local, buckets):
    rows = [("busy", f"i{n % 9}", str(n), "") for n in range(300)] + [(f"用户{n}", "a", "1", "") for n in range(40)]
    write_events(tmp_path / "logs", 3, rows)
    config = config_of(tmp_path, tmp_path / "logs", buckets=buckets)
    manifest = run(config)
    assert manifest["buckets"] == (buckets or 1)
    assert len(list((config.run_dir / "prepared" / "events").iterdir())) == manifest["buckets"]
    assert {user: len(events) for user, events in histories(config).items()} == {
        "busy": 300,
        **{f"用户{n}": 1 for n in range(40)},
    }


def test_items_with_very_long_texts(tmp_path, ray_local):
    write_events(tmp_path / "logs")
    config = config_of(tmp_path, tmp_path / "logs")
    text = "长" * 100_000
    (tmp_path / "items.csv").write_text(f"item_id,title,genres,year\na,{text},x,1\n", encoding="utf-8")
    run(config)
    found = pq.read_table(config.run_dir / "prepared" / "items" / "text.parquet").to_pydict()["value"]
    assert found[0] == f"title: {text} genres: x"
