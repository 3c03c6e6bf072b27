from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from mvrec_core.approximate import Approximate
from mvrec_core.errors import ResourceError
from mvrec_core.index import top_k
from mvrec_core.requests import Item, Request

pytest.importorskip("faiss")


def unit(rows):
    return torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=-1)


@pytest.fixture(scope="module")
def catalogue():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(50, 16))
    items = unit(centres[draw.integers(0, 50, 5000)] + 0.5 * draw.normal(size=(5000, 16)))
    users = unit(items[draw.integers(0, 5000, (64, 2))].sum(1).numpy())
    index = Approximate.build(items, users)
    return items, users, index


NONE = torch.zeros(0, dtype=torch.int64)


def test_it_finds_nearly_what_exact_search_finds(catalogue):
    items, users, index = catalogue
    everything = torch.ones(64, 5000, dtype=torch.bool)
    everything[:, ::7] = False
    found = index.top_k(users, items, 20, everything, NONE, 2.0, -1.0)
    exact = top_k(users, items, 20, everything, 2.0, -1.0)
    shared = [len(set(a) & set(b)) / 20 for a, b in zip(found.index.tolist(), exact.index.tolist(), strict=True)]
    assert index.recall >= 0.98 and np.mean(shared) >= 0.95
    assert everything.gather(1, found.index).all() and (found.score.diff() <= 0).all()
    own = (users @ items.T * 2 - 1).gather(1, found.index)
    torch.testing.assert_close(found.score, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [0, 3, 30, 2000])
def test_where_few_may_come_it_is_exact(catalogue, kept):
    items, users, index = catalogue
    few = torch.zeros(64, 5000, dtype=torch.bool)
    few[:, torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:kept]] = True
    found, exact = index.top_k(users, items, 20, few, NONE, 1.0, 0.0), top_k(users, items, 20, few)
    assert found.index.tolist() == exact.index.tolist()


def test_changed_and_new_rows_are_found_where_they_are_now(catalogue):
    items, users, index = catalogue
    now = torch.cat([items, users[:1], users[1:2]])
    now[10] = users[0]
    found = index.top_k(users, now, 5, torch.ones(64, 5002, dtype=torch.bool), torch.tensor([10, 5000, 5001]), 1.0, 0.0)
    assert found.index[0, :2].tolist() == [10, 5000] and found.index[1, 0] == 5001
    assert found.score[0, :2].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_recommender_of_either_kind_gives_k_items(plain_recommender):
    approximate = plain_recommender.approximate().with_items([Item("新片", {"title": "film number 12"})], 1)
    exact = plain_recommender.with_items([Item("新片", {"title": "film number 12"})], 1)
    requests = [Request("u003", k=5), Request("u004", k=34), Request("u005", k=3, allow=frozenset({"新片"}))]
    for one, other in zip(approximate.recommend(requests), exact.recommend(requests), strict=True):
        shared = {item.item_id for item in one.items} & {item.item_id for item in other.items}
        assert len(one.items) == len(other.items) and len(shared) >= 0.8 * len(one.items)


def test_where_the_recall_is_not_reached_search_stays_exact(monkeypatch):
    monkeypatch.setattr("mvrec_core.approximate.PROBES", (1,))
    draw = np.random.default_rng(0)
    assert Approximate.build(unit(draw.normal(size=(4000, 32))), unit(draw.normal(size=(20, 32)))) is None


def test_without_faiss_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ResourceError, match=r"pip install 'mvrec\[faiss\]'"):
        Approximate.build(torch.ones(2, 2), torch.ones(1, 2))
