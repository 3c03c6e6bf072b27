from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvrec_core.batch import collate
from mvrec_core.catalog import FIRST
from mvrec_core.features import MISSING_TIME
from mvrec_core.sequences import TEST, TRAIN, VALID, Histories, live_examples, stage_examples, train_examples


def make(splits):
    """Histories with a list of splits a user; every event is of an item of its own: FIRST + its row."""
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in splits])]).astype(np.int64)
    rows = int(offsets[-1])
    split = np.array([x for s in splits for x in s], np.int8)
    ids = pa.array([f"u{n}" for n in range(len(splits))], pa.string())
    now = np.full(len(splits), MISSING_TIME)
    return Histories(ids, offsets, np.arange(rows) + FIRST, np.arange(rows), split, {}, {}, now)


def columns(examples):
    return [getattr(examples, name).tolist() for name in ("user", "start", "stop", "first", "limit")]


LONG = [TRAIN] * 5 + [VALID, TEST]


WINDOWS = [[0, 0, 0, 1], [2, 0, 0, 0], [4, 2, 0, 0], [3, 1, 0, 0], [5, 3, 1, 1]]


def test_train_windows_are_cut_from_the_newest_back():
    assert columns(train_examples(make([LONG, [TRAIN]]), 2)) == WINDOWS


def test_a_window_as_long_as_the_history():
    assert columns(train_examples(make([LONG]), 5)) == [[0], [0], [4], [0], [5]]


USER = st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(0, 2)).map(
    lambda n: [TRAIN] * n[0] + [VALID] * n[1] + [TEST] * n[2]
)


DRAW = st.none() | st.integers(0, 99).map(np.random.default_rng)


@given(st.lists(USER, min_size=1, max_size=6), st.integers(1, 9), DRAW)
def test_every_train_event_is_a_target_once_and_no_other_ever(splits, max_len, draw):
    histories = make(splits)
    batch = collate(histories, train_examples(histories, max_len, draw))
    targets = batch.target[batch.target >= FIRST].tolist()
    assert sorted(targets) == histories.item[histories.split == TRAIN].tolist()
    assert int(batch.length.max() if len(batch.length) else 0) <= max_len


@given(st.lists(USER, min_size=1, max_size=6), st.integers(1, 9), DRAW)
def test_what_is_read_comes_right_before_the_target(splits, max_len, draw):
    histories = make(splits)
    batch = collate(histories, train_examples(histories, max_len, draw))
    row, place = (batch.target >= FIRST).nonzero(as_tuple=True)
    row, place = row[place > 0], place[place > 0]
    assert (batch.item[row, place - 1] + 1 == batch.target[row, place]).all()


def test_test_reads_the_validation_event_too():
    histories = make([LONG, [TRAIN, TRAIN]])
    assert columns(stage_examples(histories, "valid", 100)) == [[0], [0], [5], [5], [6]]
    assert columns(stage_examples(histories, "test", 100)) == [[0], [0], [6], [6], [7]]
    assert columns(stage_examples(histories, "test", 4)) == [[0], [2], [6], [6], [7]]


def test_users_of_a_temporal_split():
    histories = make([[VALID, VALID], [TEST], [TRAIN, TEST], [TRAIN]])
    assert columns(stage_examples(histories, "valid", 9)) == [[0], [0], [0], [0], [1]]
    assert columns(stage_examples(histories, "test", 9)) == [[1, 2], [0, 0], [0, 1], [0, 1], [1, 2]]


def test_live_reads_everything():
    assert columns(live_examples(make([LONG, []]), 3)) == [[0, 1], [4, 0], [7, 0], [7, 0], [7, 0]]


def test_events_of():
    histories = make([LONG, [TRAIN, TRAIN]])
    assert (histories.events_of(1), histories.events_of(0, 3)) == (slice(7, 9), slice(0, 3))


@pytest.mark.parametrize(("user", "items"), [("u000", ["i00", "i01", "i02"]), ("ghost", [None])])
def test_histories_of_a_table(plain_data, plain_config, user, items):
    histories = plain_data.histories(plain_config)
    row = histories.user_ids.to_pylist().index(user)
    assert histories.item[histories.events_of(row)].tolist() == [1 if i is None else FIRST + int(i[1:]) for i in items]
    assert len(histories) == 106 and len(histories.event["rating"]) == len(histories.item)
