import numpy as np
import pyarrow as pa
import pytest
import torch

from mvrec_core import graph
from mvrec_core.features import MISSING_TIME
from mvrec_core.sequences import TEST, TRAIN, VALID, Histories

ROWS = 12  # PAD, UNKNOWN, two groups of four items, two items that are alone


def histories(*users: list[int], split: list[list[int]] | None = None) -> Histories:
    size = [len(user) for user in users]
    events = sum(size)
    return Histories(
        user_ids=pa.array([f"用户{n}" for n in range(len(users))]),
        offsets=np.concatenate([[0], np.cumsum(size)]),
        item=np.array([item for user in users for item in user], np.int64),
        time=np.full(events, MISSING_TIME),
        split=np.array([s for user in split for s in user] if split else [TRAIN] * events, np.int8),
        event={},
        user={},
        now=np.full(len(users), MISSING_TIME),
    )


def groups(seed: int = 0) -> Histories:
    draw = np.random.default_rng(seed)
    return histories(*(draw.integers(2 + 4 * (n % 2), 6 + 4 * (n % 2), 9).tolist() for n in range(40)), [10], [11])


def test_items_that_keep_company_are_near_each_other():
    found = graph.vectors([groups()], ROWS, VALID, 4, 3)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    cosine = unit[2:10] @ unit[2:10].T
    inside = np.kron(np.eye(2), np.ones((4, 4))) > 0
    assert cosine[inside].min() > cosine[~inside].max()
    assert cosine[inside].mean() > cosine[~inside].mean() + 1


def test_who_is_alone_has_no_vector_and_the_others_have_one_scale():
    found = graph.vectors([groups()], ROWS, VALID, 4, 3)
    assert np.isnan(found[[0, 1, 10, 11]]).all()
    there = found[2:10]
    np.testing.assert_allclose(there.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose((there**2).mean(), 1, rtol=1e-5)


def test_the_same_events_in_any_shards_give_the_same_bits():
    whole = groups()
    half = whole.offsets[20]
    parts = [
        histories(*(whole.item[whole.events_of(user)].tolist() for user in users))
        for users in (range(20), range(20, len(whole)))
    ]
    assert half == len(parts[0].item)
    one, two = graph.vectors([whole], ROWS, VALID, 4, 3), graph.vectors(parts, ROWS, VALID, 4, 3)
    np.testing.assert_array_equal(one, two)


def test_events_of_later_splits_change_nothing():
    train = groups()
    users = [train.item[train.events_of(user)].tolist() for user in range(len(train))]
    split = [[TRAIN] * len(user) + [VALID, TEST] for user in users]
    longer = histories(*(user + [2, 10] for user in users), split=split)
    first, later = graph.vectors([train], ROWS, VALID, 4, 3), graph.vectors([longer], ROWS, VALID, 4, 3)
    np.testing.assert_array_equal(first, later)
    assert not np.array_equal(first, graph.vectors([longer], ROWS, TEST, 4, 3), equal_nan=True)


def test_more_numbers_than_items_are_zeros_and_no_events_are_no_vectors():
    found = graph.vectors([groups()], ROWS, VALID, 20, 3)
    assert (found[2:10, 7:] == 0).all() and np.isfinite(found[2:10]).all()
    assert np.isnan(graph.vectors([histories([2], [3])], ROWS, VALID, 4, 3)).all()


def brute_force(company, text, row, wanted, itself=None):
    out = []
    for n, one in enumerate(wanted):
        cosine = text @ one / (np.linalg.norm(text, axis=1) * np.linalg.norm(one))
        near = [m for m in np.argsort(-cosine) if itself is None or row[m] != itself[n]][: graph.ALIKE]
        weight = np.exp(graph.SHARPNESS * cosine[near])
        out.append(weight @ company[near] / weight.sum())
    return np.array(out)


@pytest.mark.parametrize("items", [20, 90])
def test_the_company_of_what_has_a_like_text(items):
    draw = np.random.default_rng(items)
    company, text, row = draw.normal(size=(items, 3)), draw.normal(size=(items, 6)), np.arange(items) + 2
    given = [torch.from_numpy(values) for values in (company.astype(np.float32), text, row)]
    wanted = draw.normal(size=(5, 6))
    found = graph.alike(*given, torch.from_numpy(wanted))
    np.testing.assert_allclose(found, brute_force(company, text, row, wanted), atol=1e-5)
    own = graph.alike(*given, given[1], given[2])
    np.testing.assert_allclose(own, brute_force(company, text, row, text, row), atol=1e-5)


def test_there_may_be_nothing_alike():
    nothing, one = torch.zeros(0, 3), torch.ones(1, 3)
    rows = torch.tensor([2])
    assert graph.alike(nothing, nothing, rows[:0], one).tolist() == [[0, 0, 0]]
    assert graph.alike(one, one, rows, one, rows).tolist() == [[0, 0, 0]]  # but itself
    assert graph.alike(one, one, rows, nothing).shape == (0, 3)


def test_of_many_items_some_evenly_from_all_are_looked_at(monkeypatch):
    monkeypatch.setattr(graph, "MOST_NEAR", 5)
    company = torch.arange(41, dtype=torch.float32)[:, None]
    text = torch.eye(41)
    found = graph.alike(company, text, torch.arange(41), text[[10, 11]])
    weight = np.exp([0, graph.SHARPNESS, 0, 0, 0])  # 0, 10, 20, 30 and 40
    assert found[0].item() == pytest.approx(weight @ [0, 10, 20, 30, 40] / weight.sum(), rel=1e-5)
    assert found[1].item() == pytest.approx(20)
