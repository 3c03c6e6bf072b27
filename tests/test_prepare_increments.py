"""`prepare --append` and `--only-view`: the same as a run over everything, and nothing else is touched."""

from __future__ import annotations

import random

import pytest
from logs import config_of, contents, rejected, run, write_events

from mvrec_core.errors import ConfigError, DataError
from pipelines.datasets import load

pytestmark = pytest.mark.ray


def log(seed: int, rows: int, users: int = 12) -> list[tuple[str, str, str, str]]:
    draw = random.Random(seed)
    return [
        (f"用户{draw.randrange(users)}", f"i{draw.randrange(7)}", str(draw.randrange(40)), str(draw.randrange(4)))
        for _ in range(rows)
    ]


@pytest.mark.parametrize(
    "clean",
    [
        {},
        {"duplicates": True, "repeats": True, "max_history": 3},
        {"max_history": 2},
        {"core": {"users": 3, "items": 4}, "duplicates": True},
    ],
)
def test_an_increment_is_a_full_rebuild(tmp_path, ray_local, clean):
    first, second, third = log(1, 80), log(2, 5, 3), log(3, 3, 40)
    second += first[:3]  # late and duplicate events
    config = config_of(tmp_path, tmp_path / "logs", "step", clean=clean, buckets=8)
    write_events(tmp_path / "logs", 2, first)
    run(config)
    for number, rows in enumerate((second, third)):
        write_events(tmp_path / "logs", 1, rows, first=2 + number)
        grown = run(config, append=[str(tmp_path / "logs" / f"log-{2 + number:02d}.csv")])
    whole_config = config_of(tmp_path, tmp_path / "logs", "whole", clean=clean, buckets=8)
    whole = run(whole_config)
    for key in ("content_hash", "rows", "rejected", "events", "users", "items", "views", "days", "history_lengths"):
        assert grown[key] == whole[key], key
    assert rejected(config) == rejected(whole_config)


def test_buckets_that_are_not_touched_stay_the_same_files(tmp_path, ray_local):
    config = config_of(tmp_path, tmp_path / "logs", buckets=8)
    write_events(tmp_path / "logs", 1, log(1, 60))
    run(config)
    prepared = config.run_dir / "prepared"
    before = {path: path.stat().st_ino for path in prepared.glob("events/*/*.parquet")}
    write_events(tmp_path / "more", 1, [("用户1", "a", "99", "1")])
    run(config, append=[str(tmp_path / "more")])
    changed = [path.parent.name for path, node in before.items() if path.stat().st_ino != node]
    assert len(before) == 8 and len(changed) == 1


def test_a_log_that_outgrows_its_buckets_gets_more(tmp_path, ray_local, monkeypatch):
    monkeypatch.setattr("pipelines.spool.ROWS", 50)
    config = config_of(tmp_path, tmp_path / "logs", "step", buckets=None)
    write_events(tmp_path / "logs", 1, log(1, 90))
    assert run(config)["buckets"] == 2
    write_events(tmp_path / "logs", 1, log(2, 90), first=1)
    grown = run(config, append=[str(tmp_path / "logs" / "log-01.csv")])
    whole = run(config_of(tmp_path, tmp_path / "logs", "whole", buckets=None))
    assert grown["buckets"] == whole["buckets"] == 4
    assert grown["content_hash"] == whole["content_hash"]


def test_a_file_is_not_appended_twice(tmp_path, ray_local):
    config = config_of(tmp_path, tmp_path / "logs")
    write_events(tmp_path / "logs", 1, log(1, 20))
    manifest = run(config)
    with pytest.raises(DataError, match=r"append: '.*log-00.csv' is in the prepared data already"):
        run(config, append=[str(tmp_path / "logs" / "log-00.csv")])
    assert load(config) is not None and manifest["rows"]["events"]["in"] == 20


def test_an_increment_of_another_configuration_is_refused(tmp_path, ray_local):
    write_events(tmp_path / "logs", 1, log(1, 20))
    run(config_of(tmp_path, tmp_path / "logs"))
    write_events(tmp_path / "more", 1, log(2, 20))
    other = config_of(tmp_path, tmp_path / "logs", clean={"duplicates": True})
    with pytest.raises(ConfigError, match=r"data.clean: differs from the prepared data's; run 'mvrec prepare' as a wh"):
        run(other, append=[str(tmp_path / "more")])


def test_nothing_to_go_on_from(tmp_path, ray_local):
    write_events(tmp_path / "logs", 1, log(1, 20))
    with pytest.raises(DataError, match=r"prepared: no prepared data to go on from; run 'mvrec prepare' first"):
        run(config_of(tmp_path, tmp_path / "logs"), append=[str(tmp_path / "logs" / "log-00.csv")])


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("decade", {"kind": "number", "level": "item", "column": "year"}),
        ("stars", {"kind": "category", "level": "event", "column": "rating"}),
        ("trade", {"kind": "category", "level": "user", "column": "job"}),
    ],
)
def test_one_view_more_leaves_every_other_file_alone(tmp_path, ray_local, name, view):
    write_events(tmp_path / "logs", 2, log(1, 40))
    config = config_of(tmp_path, tmp_path / "logs", clean={"duplicates": True})
    run(config)
    prepared = config.run_dir / "prepared"
    before, nodes = contents(prepared), {path: path.stat().st_ino for path in prepared.rglob("*") if path.is_file()}
    tree = config.model_dump()
    more = config.model_validate(tree | {"views": tree["views"] | {name: view}})
    manifest = run(more, only_view=name)
    after = contents(prepared)
    new = {path for path in after if path not in before}
    where = {"event": f"views/{name}/", "item": f"items/{name}.parquet", "user": f"users/{name}.parquet"}[view["level"]]
    assert new and all(path.removeprefix("test/").startswith(where) for path in new)
    told = {"manifest.json", "report.html", "fitted.json", "views.json", "spool/state.json"}
    kept = {path for path in before if path not in told and not path.startswith("spool/part-")}
    assert "events/bucket=0000/part-0.parquet" in kept and "items/id.parquet" in kept
    assert {path for path in kept if after[path] != before[path]} == set()
    assert all(
        path.stat().st_ino == node for path, node in nodes.items() if path.relative_to(prepared).as_posix() in kept
    )
    whole = run(more.model_copy(update={"name": "whole"}))
    assert manifest["content_hash"] == whole["content_hash"]
    assert run(more, only_view=name)["content_hash"] == whole["content_hash"]  # and it can be made anew


def test_one_view_of_a_changed_log_is_refused(tmp_path, ray_local):
    write_events(tmp_path / "logs", 1, log(1, 40))
    config = config_of(tmp_path, tmp_path / "logs")
    run(config)
    write_events(tmp_path / "logs", 1, log(2, 40))
    with pytest.raises(DataError, match=r"log-00.csv: has changed since the data was prepared"):
        run(config, only_view="rating")
