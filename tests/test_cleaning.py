"""Cleaning and splits: exact tables, and every row either kept or left out with a reason."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core import cleaning
from mvrec_core.data import Clean, Core, LastN, LeaveOneOut, Rate, Temporal
from mvrec_core.errors import ConfigError
from mvrec_core.schema import left_out
from mvrec_core.sequences import TEST, TRAIN, VALID

SECOND = 1_000_000


def frame(*rows: tuple) -> pl.DataFrame:
    """user, item, second, rating: sorted as `clean` wants them; `row` is the place among the arguments."""
    columns = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float64}
    table = pl.DataFrame(rows, schema=columns, orient="row").with_row_index("row")
    table = table.with_columns(pl.col("timestamp") * SECOND)
    return table.sort("user_id", "timestamp", maintain_order=True)


def reasons(rows: pl.DataFrame, **steps) -> dict[int, str]:
    kept, gone = cleaning.clean(rows, Clean(**steps), ["rating"])
    assert sorted([*kept["row"], *gone["row"]]) == sorted(rows["row"])
    return dict(zip(gone["row"].to_list(), gone["reason"].to_list(), strict=True))


def test_of_equal_rows_the_first_stays():
    rows = frame(("甲", "电影", 1, 5.0), ("甲", "电影", 1, 4.0), ("甲", "电影", 1, 5.0), ("乙", "电影", 1, 5.0))
    assert reasons(rows, duplicates=True) == {2: "duplicate row"}
    assert reasons(frame(("u", "a", 1, None), ("u", "a", 1, None)), duplicates=True) == {1: "duplicate row"}


def test_repeats_are_of_the_item_directly_before():
    rows = frame(("u", "a", 1, 1.0), ("u", "a", 2, 2.0), ("u", "b", 3, 1.0), ("u", "a", 4, 1.0), ("v", "a", 5, 1.0))
    assert reasons(rows, repeats=True) == {1: "the item of the event before"}


def test_repeats_are_looked_for_after_duplicates():
    rows = frame(("u", "a", 1, 1.0), ("u", "b", 1, 1.0), ("u", "a", 1, 1.0), ("u", "b", 2, 1.0))
    assert reasons(rows, duplicates=True, repeats=True) == {2: "duplicate row", 3: "the item of the event before"}


def test_a_user_beyond_the_rate_goes_whole():
    rows = frame(*[("bot", f"i{n}", n, None) for n in range(3)], ("bot", "z", 90, None), ("u", "a", 0, None))
    told = "the user has more than 2 events within 3 s"
    assert reasons(rows, max_rate=Rate(events=2, seconds=3)) == dict.fromkeys(range(4), told)
    assert reasons(rows, max_rate=Rate(events=2, seconds=2)) == {}  # the third comes 2 s after the first, not within


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (LeaveOneOut(), {"long": [0, 0, 0, 1, 2], "three": [0, 1, 2], "two": [0, 0]}),
        (LastN(kind="last_n", n=2), {"long": [0, 1, 1, 2, 2], "three": [0, 0, 0], "two": [0, 0]}),
        (
            Temporal(kind="temporal", valid_from="1970-01-01T00:00:02", test_from="1970-01-01T08:00:04+08:00"),
            {"long": [0, 0, 1, 1, 2], "three": [0, 0, 1], "two": [0, 0]},
        ),
    ],
)
def test_splits(by, expected):
    rows = frame(*[(user, "i", n, None) for user, split in expected.items() for n in range(len(split))])
    found = rows.with_columns(cleaning.split(rows, by)).group_by("user_id", maintain_order=True).agg("split")
    assert dict(found.iter_rows()) == expected


def test_cuts_in_the_wrong_order_are_an_error():
    with pytest.raises(ConfigError, match="expected valid_from before test_from, found 2024-02-01, 2024-01-01"):
        cleaning.cuts(Temporal(kind="temporal", valid_from="2024-02-01", test_from="2024-01-01"))


def test_max_history_keeps_the_newest_train_events_and_what_is_held_out():
    rows = frame(*[("u", f"i{n}", n, None) for n in range(6)])
    rows = rows.with_columns(cleaning.split(rows, LeaveOneOut()))
    kept, gone = cleaning.part(rows, cleaning.beyond(2))
    assert kept["row"].to_list() == [2, 3, 4, 5]
    assert gone["reason"].unique().to_list() == ["older than the newest 2 train events"]


def test_the_core_leaves_cold_events_alone_where_it_asks_for_one():
    rows = frame(("u", "a", 1, None), ("u", "b", 2, None), ("v", "a", 3, None))
    reason = cleaning.outside_core(Core(users=1, items=2), pl.Series(["u"]), pl.Series(["a"]))
    kept, gone = cleaning.part(rows, reason)
    assert kept["row"].to_list() == [0, 2]
    assert gone["reason"].to_list() == ["item_id is outside the core of 1 events a user and 2 an item"]


def test_filters_name_what_they_wanted():
    rows = frame(("u", "a", 1, 5.0), ("u", "b", 2, 2.0), ("u", "c", 3, None), ("u", "d", 9, 5.0), ("u", "e", 5, 5.0))
    steps = Clean(
        keep={"item_id": ("a", "b", "c", "d")},
        ranges={"rating": {"min": 3}},
        since="1970-01-01T00:00:01Z",
        until="1970-01-01T00:00:09Z",
    )
    assert rows.select(reason=left_out(rows, steps))["reason"].to_list() == [
        None,
        "rating is not in 3 to any",
        "rating is not in 3 to any",
        "item_id is not one of a, b, c, d",
        "at or after 1970-01-01T00:00:09Z",
    ]


events = st.lists(
    st.tuples(
        st.sampled_from(["u", "v", "用户"]), st.sampled_from("ab"), st.integers(0, 9), st.sampled_from([None, 1.0, 2.0])
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(events, st.booleans(), st.booleans(), st.none() | st.integers(1, 4))
def test_rows_in_are_rows_kept_plus_rows_left_out_in_order(rows, duplicates, repeats, rate):
    steps = Clean(
        duplicates=duplicates, repeats=repeats, max_rate=Rate(events=rate, seconds=3) if rate is not None else None
    )
    sorted_rows = frame(*rows)
    kept, gone = cleaning.clean(sorted_rows, steps, ["rating"])
    assert len(rows) == len(kept) + len(gone)
    assert not gone["reason"].has_nulls()
    places = [sorted_rows["row"].to_list().index(row) for row in kept["row"]]
    assert places == sorted(places)
    if duplicates:
        assert kept.drop("row").is_unique().all()
    if repeats:
        pairs = kept.select("user_id", "item_id").rows()
        assert all(a != b for a, b in zip(pairs, pairs[1:], strict=False))


@settings(max_examples=150, deadline=None)
@given(events, st.integers(1, 4), st.integers(0, 2), st.integers(1, 40))
def test_what_is_cut_before_the_shuffle_would_be_cut_after_it(rows, newest, held, chunk):
    by = (
        LastN(kind="last_n", n=held)
        if held
        else Temporal(kind="temporal", valid_from="1970-01-01T00:00:05", test_from="1970-01-01T00:00:08")
    )
    whole = frame(*rows)
    whole = whole.with_columns(cleaning.split(whole, by))
    wanted = cleaning.part(whole, cleaning.beyond(newest))[1]["row"].to_list()
    early = []
    for start in range(0, len(rows), chunk):  # as the log is read
        some = frame(*rows).filter(pl.col("row").is_between(start, start + chunk - 1))
        early += cleaning.part(some, cleaning.surely_beyond(newest, by))[1]["row"].to_list()
    assert set(early) <= set(wanted)


def test_items_held_out_as_new_are_left_only_in_test():
    items = [f"商品{n}" for n in range(300)]
    frame = pl.DataFrame(
        {"item_id": items * 3, "split": [TRAIN] * 300 + [VALID] * 300 + [TEST] * 300},
        schema_overrides={"split": pl.Int8},
    )
    kept, gone = cleaning.part(frame, cleaning.held_out(0.1))
    before, test = kept.filter(pl.col("split") != TEST), kept.filter(pl.col("split") == TEST)
    new = set(gone["item_id"])
    assert 15 < len(new) < 45 and set(gone["reason"]) == {"the item is held out as new"}
    assert set(before["item_id"]) == set(items) - new and len(before) == 2 * (300 - len(new))
    assert test["item_id"].to_list() == items
    more = set(cleaning.part(frame, cleaning.held_out(0.2))[1]["item_id"])
    assert new < more  # by the id alone, so a larger share holds out the same items and others
