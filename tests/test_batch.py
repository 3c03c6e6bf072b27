from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from mvrec_core.batch import collate, rounded
from mvrec_core.features import MISSING_TIME
from mvrec_core.sequences import Examples, Histories

NAN = float("nan")
HISTORIES = Histories(
    user_ids=pa.array(["a", "b"]),
    offsets=np.array([0, 3, 4]),
    item=np.array([5, 6, 7, 8]),
    time=np.array([10, 20, 30, 40]),
    split=np.zeros(4, np.int8),
    event={
        "rating": np.array([0.5, NAN, 1.5, 2.5], np.float32),
        "tag": np.array([[2, 3], [2, 0], [0, 0], [4, 0]]),
        "time": np.array([10, 20, 30, 40]),
    },
    user={"gender": np.array([[2], [0]]), "age": np.array([0.25, NAN], np.float32)},
    now=np.array([35, MISSING_TIME]),
)


def examples(*rows):
    """Rows of user, start, stop, first, limit."""
    return Examples(*(np.array(column) for column in zip(*rows, strict=True)))


def test_every_tensor_of_a_batch():
    batch = collate(HISTORIES, examples((0, 0, 2, 0, 3), (1, 0, 1, 0, 1)))
    assert batch.item.tolist() == [[5, 6], [8, 0]]
    assert batch.time.tolist() == [[10, 20], [40, MISSING_TIME]]
    assert batch.length.tolist() == [2, 1]
    assert batch.target.tolist() == [[5, 6, 7], [8, 0, 0]]
    torch.testing.assert_close(batch.event["rating"], torch.tensor([[0.5, NAN], [2.5, NAN]]), equal_nan=True)
    assert batch.event["tag"].tolist() == [[[2, 3], [2, 0]], [[4, 0], [0, 0]]]
    assert batch.event["time"].tolist() == batch.time.tolist()
    assert batch.user["gender"].tolist() == [[2], [0]]
    torch.testing.assert_close(batch.user["age"], torch.tensor([0.25, NAN]), equal_nan=True)


@pytest.mark.parametrize(("first", "limit", "target"), [(0, 3, [5, 6, 7]), (0, 2, [5, 6, 0]), (2, 3, [0, 0, 7])])
def test_targets_are_those_from_first_to_limit(first, limit, target):
    assert collate(HISTORIES, examples((0, 0, 2, first, limit))).target.tolist() == [target]


def test_a_window_that_starts_later_has_no_target_for_the_profile():
    assert collate(HISTORIES, examples((0, 1, 2, 2, 3))).target.tolist() == [[0, 7]]


def test_an_empty_history():
    batch = collate(HISTORIES, examples((1, 0, 0, 0, 1)))
    assert (batch.item.shape, batch.length.tolist(), batch.target.tolist()) == ((1, 0), [0], [[8]])
    assert batch.event["tag"].shape == (1, 0, 2)


def test_to_moves_every_tensor():
    batch = collate(HISTORIES, examples((0, 0, 2, 0, 3))).to("meta")
    devices = {t.device.type for t in (batch.item, batch.target, batch.event["tag"], batch.user["age"])}
    assert devices == {"meta"}


def test_now_is_when_the_next_event_happened_or_the_request_is_made():
    batch = collate(HISTORIES, examples((0, 0, 2, 0, 3), (0, 1, 3, 1, 3), (1, 0, 1, 0, 1)))
    gone = int(MISSING_TIME)
    assert batch.now.tolist() == [[10, 20, 30], [20, 30, 35], [40, gone, gone]]


def test_lengths_are_rounded_to_few_by_less_than_an_eighth():
    sizes = [rounded(n) for n in range(1, 1025)]
    assert sizes[:18] == [*range(1, 17), 18, 18] and rounded(0) == 0
    assert all(n <= size < n * 1.125 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 16 + 6 * 8
