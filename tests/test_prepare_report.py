"""What `prepare` says at its end, and its report.html, from manifests alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
import warnings
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Page

from pipelines import prepare_report

FIRST = date(2017, 1, 1)


def manifest(**changed):
    tree = {
        "schema_version": 2,
        "name": "小店",
        "config": {},
        "sources": [
            {"source": "events", "file": "日志/一月.csv", "bytes": 1_979_230, "sha256": "4edb74e2a811" + "0" * 52},
            {"source": "items", "file": "items.csv", "bytes": 512, "sha256": "51d7cdf777ce" + "0" * 52},
        ],
        "rows": {
            "events": {"in": 12_030, "kept": 12_000, "rejected": 30},
            "items": {"in": 41, "kept": 40, "rejected": 1},
            "users": {"in": 101, "kept": 101, "rejected": 0},
        },
        "rejected": {
            "events": {"user_id is missing": 4, "列“数量”不是数字": 25, "a row seen before": 1},
            "items": {"item_id is missing": 1},
            "users": {},
        },
        "users": 101,
        "short_users": 3,
        "items": 41,
        "unknown_items": 1,
        "items_without_text": 2,
        "events": {"train": 11_804, "valid": 98, "test": 98},
        "span": ["2017-01-01T00:00:01+00:00", "2017-01-03T23:59:59.5+00:00"],
        "vocabulary": {"类别": 4},
        "views": {
            "id": {"kind": "id", "level": "item", "values": 41, "missing": 0, "unreadable": 0},
            "text": {"kind": "text", "level": "item", "values": 39, "missing": 2, "unreadable": 0},
            "类别": {"kind": "category", "level": "item", "values": 40, "missing": 1, "unreadable": 0},
            "折扣": {"kind": "number", "level": "event", "values": 11_999, "missing": 1, "unreadable": 1},
        },
        "conflicts": {"items": {"title": 3, "价格": 12, "brand": 0}, "users": {}},
        "days": {"2017-01-01": [11_000, 0, 0], "2017-01-03": [804, 98, 98]},
        "history_lengths": {"1": 1, "2": 2, "3-4": 48, "5-8": 50},
        "popularity": [9_000, 2_000, 1_000],
        "popularity_ranks": [1, 2, 3],
        "buckets": 1,
        "content_hash": "79674bcb30a318df" * 4,
        "seconds": 1.25,
    }
    return tree | changed


EVENTS_ONLY = {
    "rows": {"events": {"in": 7, "kept": 7, "rejected": 0}},
    "rejected": {"events": {}},
    "views": {"id": {"kind": "id", "level": "item", "values": 1, "missing": 0, "unreadable": 0}},
    "conflicts": {},
    "users": 1,
    "short_users": 0,
    "items": 1,
    "unknown_items": 0,
    "items_without_text": None,
    "events": {"train": 5, "valid": 1, "test": 1},
    "span": ["2017-01-01T00:00:00+00:00", "2017-01-01T00:00:00+00:00"],
    "days": {"2017-01-01": [5, 1, 1]},
    "history_lengths": {"1": 0, "2": 0, "3-4": 0, "5-8": 1},
    "popularity": [7],
    "popularity_ranks": [1],
}


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# lines


def test_the_table_of_a_log_with_chinese_names():
    assert prepare_report.lines(manifest()) == [
        "小店, prepared in 1.2 s",
        "",
        "                          in    kept  rejected",
        "events                12,030  12,000        30",
        "  列“数量”不是数字                          25",
        "  user_id is missing                         4",
        "  a row seen before                          1",
        "items                     41      40         1",
        "  item_id is missing                         1",
        "users                    101     101         0",
        "",
        "users  items  events   train  valid  test",
        "  101     41  12,000  11,804     98    98",
        "2017-01-01 00:00:01 to 2017-01-03 23:59:59 UTC, 3 days",
        "",
        "view  kind      level  values  missing  unreadable",
        "id    id        item       41       0%           0",
        "text  text      item       39     4.9%           0",
        "类别  category  item       40     2.4%           0",
        "折扣  number    event  11,999    <0.1%           1",
        "",
        "conflicts, in ids",
        "items.title         3",
        "items.价格         12",
        "",
        "notes",
        "users with too few events to be split: all train, none is tested  3",
        "items without text: their text view is masked                     2",
        "items of the log that the items file lacks                        1",
        "",
        "content hash 79674bcb30a318df79674bcb30a318df79674bcb30a318df79674bcb30a318df",
    ]


def test_the_table_of_a_log_alone_says_nothing_of_what_is_not_there():
    assert prepare_report.lines(manifest(**EVENTS_ONLY)) == [
        "小店, prepared in 1.2 s",
        "",
        "        in  kept  rejected",
        "events   7     7         0",
        "",
        "users  items  events  train  valid  test",
        "    1      1       7      5      1     1",
        "2017-01-01 00:00:00 to 2017-01-01 00:00:00 UTC, 1 day",
        "",
        "view  kind  level  values  missing  unreadable",
        "id    id    item        1       0%           0",
        "",
        "content hash 79674bcb30a318df79674bcb30a318df79674bcb30a318df79674bcb30a318df",
    ]


def test_long_names_give_way_and_numbers_do_not():
    many = 12_345_678_901
    view = {"kind": "category", "level": "event", "values": many, "missing": 0, "unreadable": many}
    found = prepare_report.lines(
        manifest(
            name="店" * 90,
            rows={"events": {"in": many, "kept": many, "rejected": many}},
            rejected={"events": {"很长的理由" * 30: many, "a long reason " * 30: 1}},
            views={"视图" * 50: view},
            conflicts={"items": {"列" * 99: many}},
        )
    )
    assert max(map(columns, found)) == 100
    assert found[0] == "店" * 49 + "…"
    assert found[4].startswith("  很长的理由很长的理由") and found[4].endswith("…" + " " * 35 + "12,345,678,901")
    assert sum(line.endswith("12,345,678,901") for line in found) == 4


def test_a_name_cannot_move_the_cursor():
    found = prepare_report.lines(manifest(rejected={"events": {"bad\x1b[2Jrow\nnext\r": 30}}))
    assert "  bad [2Jrow next" in found[4]
    assert all(line.isprintable() for line in found)


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "-"), (0, 9, "0%"), (9, 9, "100%"), (1, 3, "33.3%"), (1, 9999, "<0.1%"), (9998, 9999, ">99.9%")],
)
def test_a_share_says_none_and_all_only_where_it_is_so(part, whole, text):
    assert prepare_report.share(part, whole) == text


# days


def test_up_to_120_days_each_have_their_bar():
    first, edges, heights = prepare_report.binned({"2016-02-28": [1, 2, 3], "2016-03-01": [4, 0, 0]})
    assert (first, edges) == (date(2016, 2, 28), [0, 1, 2, 3])
    assert heights.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]


def test_a_year_is_weeks_and_its_last_day_is_a_mean_too():
    days = {str(FIRST + timedelta(n)): [n % 7, 1, 0] for n in range(365)}
    _, edges, heights = prepare_report.binned(days)
    assert edges[:3] == [0, 7, 14] and edges[-2:] == [364, 365]
    assert heights.tolist() == [[3, 1, 0]] * 52 + [[0, 1, 0]]


def test_ten_thousand_days_are_120_bars():
    _, edges, heights = prepare_report.binned({str(FIRST + timedelta(n)): [1, 0, 0] for n in range(10_000)})
    assert len(heights) == 120 and edges[1] == 84 and heights.min(0).tolist() == [1, 0, 0]


@given(st.dictionaries(st.dates(), st.lists(st.integers(0, 10**9), min_size=3, max_size=3), min_size=1, max_size=20))
def test_no_event_is_lost_in_bins(days):
    _, edges, heights = prepare_report.binned({str(day): counts for day, counts in days.items()})
    widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert len(heights) <= 120 and min(widths) > 0
    total = sum(width * heights[place] for place, width in enumerate(widths))
    assert total.tolist() == pytest.approx([sum(c) for c in zip(*days.values(), strict=True)])


# prepare_report.html


def figures(text: str) -> list[str]:
    return re.findall(r"<figure.*?<h2>(.*?)</h2>", text, re.DOTALL)


ALL = ["Events a day", "History lengths", "Item popularity", "Missing values"]


@pytest.mark.parametrize(
    ("changed", "plots"),
    [
        ({}, ALL),
        (EVENTS_ONLY, ALL),
        ({"items": 0, "popularity": [], "popularity_ranks": []}, [ALL[0], ALL[1], ALL[3]]),
        ({"popularity": [0, 0], "popularity_ranks": [1, 2]}, [ALL[0], ALL[1], ALL[3]]),
        ({"users": 0, "days": {}, "history_lengths": {}}, ALL[2:]),
        ({"views": {"类": {"kind": "number", "level": "user", "values": 0, "missing": 0, "unreadable": 0}}}, ALL),
        ({"days": {str(FIRST + timedelta(n)): [1, 1, 1] for n in range(365)}}, ALL),
        ({"days": {"0001-01-01": [1, 0, 0], "9999-12-31": [0, 0, 1]}}, ALL),
        ({"history_lengths": {"1": 1, **{f"{2**n + 1}-{2 ** (n + 1)}": n for n in range(1, 20)}}}, ALL),
        ({"conflicts": {}, "short_users": 0, "items_without_text": 0, "unknown_items": 0}, ALL),
    ],
    ids=[
        "all",
        "events only",
        "no items",
        "no popular item",
        "no users",
        "no values",
        "a year",
        "all time",
        "long",
        "",
    ],
)
def test_a_plot_is_there_where_it_has_something_to_show(changed, plots):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures(prepare_report.html(manifest(**changed))) == plots


def test_the_page_has_the_numbers_and_the_names():
    texts = Page(prepare_report.html(manifest())).texts
    for text in ("小店", "12,030", "列“数量”不是数字", "类别", "items.价格", "日志/一月.csv", "2.0 MB", "4edb74e2a811"):
        assert text in texts, text
    for text in (
        "Prepared data, 2017-01-01 00:00:01 to 2017-01-03 23:59:59 UTC, 3 days",
        "The busiest day, 2017-01-01, has 11,000 events.",
        "Users by the number of their events; the median user has 3-4 events.",
        "Events of an item by its rank. The most popular has 9,000 (75.0% of all events), rank 3 has 1,000.",
        "Views that miss values: 3 of 4. What is missing is masked, never filled in.",
        "79674bcb30a318df" * 4,
        "Prepared in 1.2 s, 1 bucket",
    ):
        assert text in texts, text


def test_names_are_text_and_never_markup():
    evil = "<script>alert('坏')</script>&\"x"
    view = {"kind": "number", "level": "event", "values": 1, "missing": 1, "unreadable": 0}
    source = {"source": "events", "file": evil, "bytes": 1, "sha256": evil}
    changed = {"name": evil, "views": {evil: view}, "sources": [source], "conflicts": {"items": {evil: 1}}}
    page = Page(prepare_report.html(manifest(**changed, rejected={"events": {evil: 30}})))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts.count(evil) == 5  # heading, reason, plot, row of the view, file
    assert f"{evil}: prepared data" in page.texts and f"items.{evil}" in page.texts
    assert page.values("title") == [evil]


def test_the_page_needs_nothing_but_itself():
    text = prepare_report.html(manifest())
    page = Page(text)
    assert "://" not in text and "@import" not in text
    assert not {"script", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    assert {value[:1] for value in page.values("href", "src", "xlink:href") if value != "data:,"} == {"#"}
    assert set(re.findall(r"url\((.)", text)) == {"#"}


def test_the_ids_of_a_page_are_its_own_and_what_refers_to_one_finds_it():
    text = prepare_report.html(manifest())
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    named = [name for value in page.values("aria-labelledby") for name in str(value).split()]
    drawn = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert len(drawn) > 10 and set(named + drawn) <= set(ids)


def test_a_plot_says_in_words_what_it_shows_and_takes_the_colours_of_the_page():
    text = prepare_report.html(manifest())
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 4
    assert [re.search(r"<title[^>]*>(.*?)</title>", plot).group(1) for plot in plots] == ALL
    assert all(
        'role="img"' in plot and len(re.search(r"<desc[^>]*>(.*?)</desc>", plot).group(1)) > 40 for plot in plots
    )
    assert not re.findall(r"(?:fill|stroke): #", "".join(plots))
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", "".join(plots))) <= defined


def test_the_same_manifest_gives_the_same_bytes_in_any_process():
    code = "import json, sys; from pipelines import prepare_report as report\n"
    code += "print(report.html(json.load(sys.stdin)), end='')"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8", "TZ": "Asia/Shanghai"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(manifest()).encode(), env=env, capture_output=True, check=True
    )
    prepare_report.html(manifest(**EVENTS_ONLY))
    assert done.stdout.decode() == prepare_report.html(manifest()) == prepare_report.html(manifest())
