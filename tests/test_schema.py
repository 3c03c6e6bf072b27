"""Validation of raw columns: exact values, and every row either read or refused."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core.schema import invalid_ids, read_ids, read_timestamps, read_value, tidy, unreadable
from mvrec_core.views import CategoryView, NumberView, TextView


def times(values: list, unit: str = "s", dtype=pl.String) -> list[int | None]:
    frame = pl.DataFrame({"timestamp": pl.Series(values, dtype=dtype)})
    return read_timestamps(frame, unit)[0]["timestamp"].to_list()


def test_seconds_as_text():
    assert times(["881250949", "881250949.0", "1.5", "-5", "abc", "", None, "nan", "1700000000000"]) == [
        881250949000000, 881250949000000, 1500000, -5000000, None, None, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("ms", "1700000000123", 1700000000123000),
        ("us", "1700000000123456", 1700000000123456),
        ("ns", "1700000000123456789", 1700000000123456),
        ("iso", "2024-01-02T03:04:05Z", 1704164645000000),
        ("iso", "2024-01-02T03:04:05+02:00", 1704157445000000),
        ("iso", "2024-02-31T00:00:00Z", None),
    ],
)
def test_units(unit, value, expected):
    assert times([value], unit) == [expected]


def test_integers_are_ids_without_a_detour_through_floats():
    frame = read_ids(pl.DataFrame({"user_id": [2**60 + 1, None]}), ["user_id"])
    assert frame["user_id"].to_list() == ["1152921504606846977", None]
    assert read_ids(pl.DataFrame({"user_id": [196.0, None]}), ["user_id"])["user_id"].to_list() == ["196", None]


def test_views_read_values():
    frame = pl.DataFrame({"title": ["玩具", " ", None], "genres": ["x| y", "", "|"], "year": ["1995", "abc", ""]})
    text = TextView(kind="text", columns=("title", "genres"))
    assert read_value(frame, text).to_list() == ["title: 玩具 genres: x| y", None, "genres: |"]
    genres = CategoryView(kind="category", level="item", column="genres", separator="|")
    assert read_value(frame, genres).to_list() == [["x", "y"], None, None]
    year = NumberView(kind="number", level="item", column="year")
    assert read_value(frame, year).to_list() == [1995.0, None, None]
    assert unreadable(frame, year) == 1


cells = st.one_of(st.none(), st.text(max_size=8), st.integers().map(str), st.floats().map(str))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(cells, cells, cells), max_size=30), st.sampled_from(["s", "ms", "us", "ns", "iso"]))
def test_rows_in_are_rows_read_plus_rows_refused(rows, unit):
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    frame = read_ids(frame, ["user_id", "item_id"])
    frame, reason = read_timestamps(frame, unit)
    refused = frame.select(
        pl.coalesce(
            invalid_ids(["user_id", "item_id"]), pl.when(pl.col("timestamp").is_null()).then(pl.lit(reason))
        ).alias("r")
    )["r"]
    assert len(frame) == len(rows) == refused.is_null().sum() + refused.is_not_null().sum()
    kept = frame.filter(refused.is_null())
    assert kept.null_count().row(0) == (0, 0, 0)


def test_a_list_is_no_number():
    frame = pl.DataFrame({"price": pl.Series([["1"], None], dtype=pl.List(pl.String))})
    price = NumberView(kind="number", level="item", column="price")
    assert read_value(frame, price).to_list() == [None, None] and unreadable(frame, price) == 1


def test_text_is_tidied_step_by_step():
    texts = pl.Series([" Cafe\u0301 &amp; Bar\x00 ", "电影&#33;", "\t", "a & b", None])
    assert tidy(texts, ("html", "nfc", "control")).to_list() == ["Café & Bar", "电影!", None, "a & b", None]
    assert tidy(texts, ()).to_list() == ["Cafe\u0301 &amp; Bar\x00", "电影&#33;", None, "a & b", None]
