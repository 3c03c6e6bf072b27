"""Items and users: one row an id, whatever the rows of the files say about it."""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core.config import Config
from mvrec_core.errors import ConfigError, DataError
from mvrec_core.reading import parse_config
from pipelines import spool, tables

POLICIES = ["newest", "most_frequent", "error"]
HEADER = ["item_id", "title", "genres", "price"]
ROWS = [  # 电1 is said four times, 电2 twice in the same words, 电3 once
    ["电1", "流浪地球", "科幻", "9"],
    ["电2", "卧虎藏龙", "武侠|爱情", "5"],
    ["电1", "流浪地球", "", "7"],
    ["电3", "", "", "abc"],
    ["电1", "流浪地球", "科幻", "9"],
    ["电2", " 卧虎藏龙", "武侠|爱情", "5 "],
    ["电1", "流浪地球2", "灾难", ""],
]
DATED = [  # id, title, genres, price, date
    ["电1", "流浪地球", "科幻", "9", "30"],
    ["电1", "旧名", "科幻", "8", "10"],
    ["电2", "卧虎藏龙", "武侠", "5", "20"],
    ["电1", "流浪地球", "科幻", "9", "20"],
    ["电2", "藏龙", "武侠", "5", "20"],
    ["电4", "未来", "", "1", "40"],
    ["电1", "剧透", "", "1", "40"],
    ["电3", "", "", "", "前天"],
]


def config_of(directory: Path, split: dict | None = None, users: bool = False, **source) -> Config:
    source = {"path": str(directory / "*")} | source
    data = {"events": {"path": "unused"}, "items": source, "split": split or {"kind": "leave_one_out"}}
    views: dict = {
        "id": {"kind": "id"},
        "text": {"kind": "text", "columns": ["title", "genres"]},
        "genres": {"kind": "category", "level": "item", "column": "genres", "separator": "|"},
        "price": {"kind": "number", "level": "item", "column": "price"},
    }
    if users:
        data = data | {"items": None, "users": source}
        views = {"id": {"kind": "id"}, "job": {"kind": "category", "level": "user", "column": "job"}}
    return parse_config({"name": "t", "data": data, "views": views, "model": {"text": {"path": "unused"}}}, "test")


def write(directory: Path, rows: list[list[str]], name: str = "items.csv", header: list[str] = HEADER) -> str:
    with (directory / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return str(directory / name)


def write_dated(directory: Path) -> str:
    return write(directory, DATED, header=[*HEADER, "changed"])


def said(table: tables.Table) -> dict[str, tuple]:
    """id -> the values of the three column views, in the order of the table"""
    return {row[0]: row[1:4] for row in table.frame.rows()}


def refused(table: tables.Table) -> list[tuple[int, str]]:
    return table.rejected.select("row", "reason").rows()


EARTH, TIGER = "title: 流浪地球 genres: 科幻", "title: 卧虎藏龙 genres: 武侠|爱情"


def test_newest_keeps_the_last_row_whole(tmp_path):
    table = tables.read(config_of(tmp_path), "items", [write(tmp_path, ROWS)])
    assert table.frame.columns == ["item_id", "view.text", "view.genres", "view.price", "display"]
    assert table.frame.rows() == [
        ("电1", "title: 流浪地球2 genres: 灾难", ["灾难"], None, "流浪地球2"),
        ("电2", TIGER, ["武侠", "爱情"], 5.0, "卧虎藏龙"),
        ("电3", None, None, None, None),
    ]
    older, again = "older row of the id", "duplicate row"
    assert refused(table) == [(1, older), (3, older), (5, again), (6, again)]
    assert table.rows == 7
    assert table.unread == {"price": 1}
    assert table.conflicts == {"title": 1, "genres": 1, "price": 1}


def test_rejected_rows_are_whole_and_say_where_they_come_from(tmp_path):
    file = write(tmp_path, [[*row, "多"] for row in ROWS], header=[*HEADER, "extra"])
    table = tables.read(config_of(tmp_path), "items", [file])
    assert table.rejected.columns == spool.REJECTED.names
    source, name, row, raw, reason = table.rejected.row(3)
    assert (source, name, row, reason) == ("items", file, 6, "duplicate row")
    assert json.loads(raw) == {
        "item_id": "电2",
        "title": " 卧虎藏龙",
        "genres": "武侠|爱情",
        "price": "5 ",
        "extra": "多",
    }


def test_most_frequent_goes_column_by_column_and_duplicates_count(tmp_path):
    table = tables.read(config_of(tmp_path, conflicts="most_frequent"), "items", [write(tmp_path, ROWS)])
    assert said(table) == {
        "电1": (EARTH, ["科幻"], 9.0),
        "电2": (TIGER, ["武侠", "爱情"], 5.0),
        "电3": (None, None, None),
    }
    merged, again = "merged into another row of the id", "duplicate row"
    assert refused(table) == [(1, merged), (3, merged), (5, again), (6, again)]
    assert table.conflicts == {"title": 1, "genres": 1, "price": 1}


def test_most_frequent_breaks_ties_for_the_newest_value(tmp_path):
    rows = [["a", "旧", "x", ""], ["a", "新", "", "1"], ["a", "旧", "y", "2"], ["a", "新", "", ""]]
    table = tables.read(config_of(tmp_path, conflicts="most_frequent"), "items", [write(tmp_path, rows)])
    assert said(table) == {"a": ("title: 新 genres: y", ["y"], 2.0)}
    assert [row for row, _ in refused(table)] == [1, 2, 3]


def test_error_names_the_first_id_that_disagrees(tmp_path):
    first = write(tmp_path, [["好", "一", "", ""], ["坏", "", "", ""], ["差", "甲", "", "4"]], "1.csv")
    second = write(tmp_path, [["差", "乙", "", "5"], ["坏", "", "", "2"], ["坏", "", "", "3"]], "2.csv")
    with pytest.raises(DataError) as error:
        tables.read(config_of(tmp_path, conflicts="error"), "items", [first, second])
    assert str(error.value) == (
        f"data.items: row 2 of {second} and row 3 of {second} disagree about price of item_id '坏': '2' and '3'; "
        "expected one value, or data.items.conflicts: newest or most_frequent"
    )


def test_error_shows_the_start_of_a_long_value_on_one_line(tmp_path):
    rows = [["a", "字" * 100_000, "", ""], ["a", "一\n二", "", ""]]
    with pytest.raises(DataError) as error:
        tables.read(config_of(tmp_path, conflicts="error"), "items", [write(tmp_path, rows)])
    assert "\n" not in str(error.value) and r"字... and '一\n二';" in str(error.value)
    assert len(str(error.value)) < 500


def test_rows_that_agree_are_no_error_and_say_the_most_together(tmp_path):
    rows = [["a", "名", "", ""], ["b", "", "", ""], ["a", "", "科幻", ""], ["b", "", "", ""]]
    table = tables.read(config_of(tmp_path, conflicts="error"), "items", [write(tmp_path, rows)])
    assert said(table) == {"a": ("title: 名 genres: 科幻", ["科幻"], None), "b": (None, None, None)}
    assert refused(table) == [(1, "merged into another row of the id"), (4, "duplicate row")]
    assert table.conflicts == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_missing_value_disagrees_with_nothing(tmp_path, policy):
    rows = [["a", "名", "", "1"], ["a", "", "", " "]]
    table = tables.read(config_of(tmp_path, conflicts=policy), "items", [write(tmp_path, rows)])
    assert table.conflicts == {}
    assert said(table) == {"a": (None, None, None) if policy == "newest" else ("title: 名", None, 1.0)}


def test_the_newest_dated_row_before_an_instant_wins(tmp_path):
    dated = {"columns": {"timestamp": "changed"}, "before": "1970-01-01T00:00:40Z"}
    table = tables.read(config_of(tmp_path, **dated), "items", [write_dated(tmp_path)])
    assert said(table) == {
        "电1": (EARTH, ["科幻"], 9.0),
        "电2": ("title: 藏龙 genres: 武侠", ["武侠"], 5.0),  # of two rows of one date the later
    }
    assert refused(table) == [
        (2, "older row of the id"),
        (3, "older row of the id"),
        (4, "duplicate row"),  # of another date, but it says the same
        (6, "dated from 1970-01-01T00:00:40Z on"),
        (7, "dated from 1970-01-01T00:00:40Z on"),
        (8, "timestamp is not a number (s since 1970) in years 1 to 9999"),
    ]
    assert table.conflicts == {"title": 2, "price": 1}


def test_a_temporal_split_keeps_items_of_later_days_out(tmp_path):
    split = {"kind": "temporal", "valid_from": "1970-01-01T00:00:30Z", "test_from": "1970-01-01T00:00:40Z"}
    dated = {"columns": {"timestamp": "changed"}, "conflicts": "most_frequent"}
    table = tables.read(config_of(tmp_path, split, **dated), "items", [write_dated(tmp_path)])
    late = "dated from 1970-01-01T00:00:30Z on"
    assert said(table) == {"电1": (EARTH, ["科幻"], 9.0), "电2": ("title: 藏龙 genres: 武侠", ["武侠"], 5.0)}
    assert [row for row, reason in refused(table) if reason == late] == [1, 6, 7]
    later = config_of(
        tmp_path, split, **dated, before="1970-01-01T00:00:31Z"
    )  # said outright, it goes before the split
    assert 1 not in [row for row, reason in refused(tables.read(later, "items", [write_dated(tmp_path)]))]


def test_rows_of_test_days_do_not_even_change_the_order(tmp_path):
    dated = {"columns": {"timestamp": "changed"}, "before": "1970-01-01T00:00:40Z"}
    file = write(tmp_path, [DATED[6], DATED[2], DATED[0]], header=[*HEADER, "changed"])
    assert list(said(tables.read(config_of(tmp_path, **dated), "items", [file]))) == ["电2", "电1"]


def test_without_a_mapped_timestamp_rows_have_no_date(tmp_path):
    rows = [["a", "新", "", "", "20"], ["a", "旧", "", "", "10"], ["", "", "", "", "昨天"]]
    file = write(tmp_path, rows, header=[*HEADER, "timestamp"])
    for columns in ({}, {"timestamp": None}):
        table = tables.read(config_of(tmp_path, columns=columns), "items", [file])
        assert said(table)["a"][0] == "title: 旧"
    table = tables.read(config_of(tmp_path, columns={"timestamp": "timestamp"}), "items", [file])
    assert said(table)["a"][0] == "title: 新"
    assert refused(table) == [(2, "older row of the id"), (3, "item_id is missing")]


def test_an_instant_that_is_none(tmp_path):
    config = config_of(tmp_path, columns={"timestamp": "changed"}, before="元旦")
    with pytest.raises(ConfigError, match="data.items.before: expected an ISO-8601 instant, found '元旦'"):
        tables.read(config, "items", [write_dated(tmp_path)])


def test_dates_of_iso_text(tmp_path):
    rows = [["a", "新", "", "", "2024-05-01T08:00:00+08:00"], ["a", "旧", "", "", "2024-04-30T23:59:59Z"]]
    file = write(tmp_path, [*rows, ["b", "末", "", "", "2024-05-01T00:00:01Z"]], header=[*HEADER, "changed"])
    config = config_of(
        tmp_path, columns={"timestamp": "changed"}, timestamp_unit="iso", before="2024-05-01T08:00:01+08:00"
    )
    assert said(tables.read(config, "items", [file])) == {"a": ("title: 新", None, None)}


def test_rows_without_an_id_and_broken_rows(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title,genres,price\n ,空,,\na,名\na,名,,\n,无,,\n", encoding="utf-8")
    table = tables.read(config_of(tmp_path), "items", [str(path)])
    assert said(table) == {"a": ("title: 名", None, None)}
    assert refused(table) == [(1, "item_id is missing"), (2, "expected 4 columns, found 2"), (4, "item_id is missing")]
    assert json.loads(table.rejected["raw"][0])["title"] == "空"
    assert json.loads(table.rejected["raw"][1]) == {"text": "a,名"}
    assert table.rows == 4


def test_no_row_at_all(tmp_path):
    file = write(tmp_path, [])
    with pytest.raises(DataError) as error:
        tables.read(config_of(tmp_path), "items", [file])
    assert str(error.value) == f"data.items: 0 rows in {file}"


def test_no_row_that_can_be_used(tmp_path):
    file = write(tmp_path, [["", "无名", "", ""], ["", "又", "", ""]])
    with pytest.raises(DataError) as error:
        tables.read(config_of(tmp_path), "items", [file])
    start, raw = str(error.value).split(", in ")
    assert start == f"data.items: all 2 rows were rejected; the first is row 1 of {file}: item_id is missing"
    assert json.loads(raw)["title"] == "无名"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_are_compared_as_lists(tmp_path, form):
    ids, lists = ["a", "b", "a", "b", "a", "c"], [["科幻"], ["x"], ["科幻", "爱情"], ["x"], ["科幻"], []]
    path = tmp_path / f"items.{form}"
    columns = {"item_id": ids, "title": ["名"] * 6, "genres": lists, "price": [1, 2, 1, 2, 1, 3]}
    if form == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=2)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    newest = tables.read(config_of(tmp_path), "items", [str(path)])
    assert [(row[0], row[2], row[3]) for row in newest.frame.rows()] == [
        ("a", ["科幻"], 1.0),
        ("b", ["x"], 2.0),
        ("c", None, 3.0),
    ]
    assert newest.frame["view.text"][1] == "title: 名 genres: x"
    assert refused(newest) == [(3, "older row of the id"), (4, "duplicate row"), (5, "duplicate row")]
    assert json.loads(newest.rejected["raw"][0])["genres"] == ["科幻", "爱情"]
    assert newest.conflicts == {"genres": 1}
    frequent = tables.read(config_of(tmp_path, conflicts="most_frequent"), "items", [str(path)])
    assert frequent.frame.equals(newest.frame)
    with pytest.raises(DataError, match=r"disagree about genres of item_id 'a': \['科幻'\] and \['科幻', '爱情'\];"):
        tables.read(config_of(tmp_path, conflicts="error"), "items", [str(path)])


def test_blanks_in_lists_are_missing(tmp_path):
    genres = [[" 科幻", ""], ["科幻"], [""], [], ["x"], []]
    rows = [{"item_id": id_, "title": "", "genres": g, "price": ""} for id_, g in zip("aabbcc", genres, strict=True)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    table = tables.read(config_of(tmp_path, conflicts="error"), "items", [str(path)])
    genres = {item: values[1] for item, values in said(table).items()}
    assert genres == {"a": ["科幻"], "b": None, "c": ["x"]}
    merged = "merged into another row of the id"
    assert refused(table) == [(2, "duplicate row"), (4, "duplicate row"), (5, merged)]


def test_only_cells_of_kept_rows_count_as_unreadable(tmp_path):
    rows = [["a", "", "", "九块"], ["a", "", "", "9"], ["b", "", "", "八块"], ["b", "", "", "八块"]]
    assert tables.read(config_of(tmp_path), "items", [write(tmp_path, rows)]).unread == {"price": 1}


def test_files_whose_columns_have_other_types(tmp_path):
    pq.write_table(
        pa.table({"item_id": [2**53 + 1, 7], "title": ["甲", "乙"], "genres": [["x"], None], "price": [1.5, 2.0]}),
        tmp_path / "a.parquet",
    )
    write(tmp_path, [["9007199254740993", "甲", "x", "1.5"], ["7", "乙", "", "2"]], "b.csv")
    table = tables.read(config_of(tmp_path), "items", [str(tmp_path / "a.parquet"), str(tmp_path / "b.csv")])
    assert said(table) == {"9007199254740993": ("title: 甲 genres: x", ["x"], 1.5), "7": ("title: 乙", None, 2.0)}
    assert refused(table) == [(1, "duplicate row"), (2, "duplicate row")]


def test_users(tmp_path):
    file = write(tmp_path, [["王", "师"], ["李", ""], ["王", "医"], ["", "农"]], "users.csv", ["uid", "job"])
    table = tables.read(config_of(tmp_path, users=True, columns={"user_id": "uid"}), "users", [file])
    assert table.frame.to_dict(as_series=False) == {"user_id": ["王", "李"], "view.job": [["医"], None]}
    assert refused(table) == [(1, "older row of the id"), (4, "user_id is missing")]
    assert set(table.rejected["source"]) == {"users"}
    assert table.conflicts == {"job": 1}


def test_columns_named_like_the_table_s_own(tmp_path):
    header = ["id", "title", "date", "place"]
    file = write(tmp_path, [["a", "一", "x", "1"], ["a", "二", "y", "2"]], header=header)
    config = config_of(tmp_path, columns={"item_id": "id"})
    views = config.model_dump()["views"] | {
        name: {"kind": "category", "level": "item", "column": name} for name in ("id", "date", "place")
    }
    views |= {"genres": {"kind": "category", "level": "item", "column": "item_id"}, "price": {"kind": "id"}}
    views["text"] |= {"columns": ["title"]}
    views.pop("id")
    config = parse_config(config.model_dump() | {"views": views}, "test")
    table = tables.read(config, "items", [file])
    assert table.frame.row(0, named=True) == {
        "item_id": "a", "view.text": "title: 二", "view.genres": ["a"], "view.date": ["y"], "view.place": ["2"],
        "display": "二",
    }  # fmt: skip
    assert table.conflicts == {"title": 1, "date": 1, "place": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_list_of_ids_alone(tmp_path, policy):
    views = {"views": {"id": {"kind": "id"}}}
    config = parse_config(config_of(tmp_path, conflicts=policy).model_dump() | views, "test")
    table = tables.read(config, "items", [write(tmp_path, [["二"], ["一"], ["二"]], header=["item_id"])])
    assert table.frame.rows() == [("二", None), ("一", None)]
    assert refused(table) == [(3, "duplicate row")]


# properties

CELLS = st.sampled_from(["", "甲", "乙"])
TABLE_ROWS = st.lists(st.tuples(st.sampled_from(["", "一", "二", "三"]), CELLS, CELLS, CELLS).map(list), max_size=12)


def read_parts(policy: str, parts: list[list[list[str]]], **source) -> tables.Table | str:
    """The table, or the message where there is none."""
    header = HEADER + ["changed"] * bool(source)
    with tempfile.TemporaryDirectory() as name:
        files = [write(Path(name), rows, f"{n}.csv", header) for n, rows in enumerate(parts)]
        try:
            return tables.read(config_of(Path(name), conflicts=policy, **source), "items", files)
        except DataError as error:
            return str(error)


def by_hand(policy: str, rows: list[list[str]]) -> dict[str, list[str]]:
    """id -> its cells, row by row as a person would"""
    found = {}
    for item in dict.fromkeys(row[0] for row in rows if row[0]):
        mine = [row[1:] for row in rows if row[0] == item]
        found[item] = mine[-1]
        if policy != "newest":
            values = [[cell for cell in column if cell] for column in zip(*reversed(mine), strict=True)]
            found[item] = [max(column, key=column.count, default="") for column in values]  # the newest of the first
    return found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(POLICIES), TABLE_ROWS)
def test_rows_in_are_kept_or_rejected(policy, rows):
    table = read_parts(policy, [rows])
    disagree = any(
        len({row[place] for row in rows if row[0] == item} - {""}) > 1
        for item in ("一", "二", "三")
        for place in (1, 2, 3)
    )
    if isinstance(table, str):
        assert not any(row[0] for row in rows) or (policy == "error" and disagree)
        return
    assert not (policy == "error" and disagree)
    assert table.rows == len(rows) == len(table.frame) + len(table.rejected)
    assert table.rejected["row"].is_unique().all()
    wanted = by_hand(policy, rows)
    assert table.frame["item_id"].to_list() == list(wanted)
    assert table.frame["display"].to_list() == [cells[0] or None for cells in wanted.values()]
    assert table.frame["view.genres"].to_list() == [[cells[1]] if cells[1] else None for cells in wanted.values()]
    reasons = Counter(table.rejected["reason"])
    assert reasons["item_id is missing"] == sum(not row[0] for row in rows)
    assert reasons["duplicate row"] == sum(bool(row[0]) for row in rows) - len({tuple(row) for row in rows if row[0]})


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POLICIES), TABLE_ROWS, st.integers(0, 12), st.integers(0, 12))
def test_files_cut_anywhere_give_the_same_table(policy, rows, first, second):
    first, second = sorted((first, second))
    whole = read_parts(policy, [rows])
    parts = read_parts(policy, [rows[:first], rows[first:second], rows[second:]])
    assert isinstance(whole, str) == isinstance(parts, str)
    if isinstance(whole, tables.Table) and isinstance(parts, tables.Table):
        assert parts.frame.equals(whole.frame)
        assert (parts.rows, parts.conflicts, parts.unread) == (whole.rows, whole.conflicts, whole.unread)
        assert parts.rejected["reason"].to_list() == whole.rejected["reason"].to_list()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POLICIES[:2]), TABLE_ROWS, st.randoms(use_true_random=False))
def test_dated_rows_come_in_any_order(policy, rows, draw):
    dated = [[*row, str(day)] for day, row in enumerate(rows)]
    shuffled = draw.sample(dated, len(dated))
    tables_ = [read_parts(policy, [each], columns={"timestamp": "changed"}) for each in (dated, shuffled)]
    if all(isinstance(table, tables.Table) for table in tables_):
        assert tables_[0].frame.sort("item_id").equals(tables_[1].frame.sort("item_id"))
        assert tables_[0].conflicts == tables_[1].conflicts
    else:
        assert not any(row[0] for row in rows)
