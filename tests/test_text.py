from __future__ import annotations

import pytest
import torch
from tiny import TEXTS

from mvrec_core.catalog import FIRST
from mvrec_core.config import TextEncoderConfig
from mvrec_core.text import Live, TextEncoder
from mvrec_core.workers import Workers


def encoder(path, **settings):
    torch.manual_seed(0)
    text = TextEncoder(TextEncoderConfig(path=str(path), max_tokens=32, **settings), TEXTS)
    text.refresh()
    return text.eval()


@pytest.fixture
def frozen(tiny_encoder):
    return encoder(tiny_encoder)


def by_hand(path, text):
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(path).eval()(**tokens).last_hidden_state[0].mean(0)


def test_distinct_texts_have_a_row_each(frozen):
    assert frozen.cache.shape == (4, 32) and (frozen.cache[3] == 0).all()
    assert frozen.text_of[:FIRST].tolist() == [3, 3] and frozen.text_of[FIRST + 2] == 3
    rows = frozen.text_of[FIRST:].tolist()
    assert rows[1] == rows[4] and sorted({rows[0], rows[1], rows[3]}) == [0, 1, 2]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_vector_is_the_mean_over_the_tokens(frozen, tiny_encoder, place):
    cached = frozen.cache[frozen.text_of[FIRST + place]]
    expected = (by_hand(tiny_encoder, TEXTS[place]) - frozen.centre) @ frozen.whiten
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)


def test_texts_differ(frozen):
    assert float(torch.pdist(frozen.cache[:3]).min()) > 0.1


@pytest.mark.parametrize("size", [2, 4])
def test_workers_share_a_refresh_out_and_get_the_bits_of_one(tiny_encoder, monkeypatch, size):
    monkeypatch.setattr("mvrec_core.text.CHUNK", 1)
    text = encoder(tiny_encoder)
    whole, parts = text.cache.clone(), []

    def heard(mine):
        parts.append(mine.clone())
        return mine

    for rank in range(size):
        text.refresh(Workers(rank, size, add=heard))
    assert sorted(int((part != 0).any(1).sum()) for part in parts) == {2: [1, 2], 4: [0, 1, 1, 1]}[size]
    text.refresh(Workers(0, size, add=lambda mine: mine + sum(parts[1:])))
    assert torch.equal(text.cache, whole)


def test_a_refresh_encodes_each_distinct_text_once(tiny_encoder, monkeypatch):
    text, seen = encoder(tiny_encoder), []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda ids, size: seen.append(len(ids)) or encode(ids, size))
    text.refresh()
    assert sum(seen) == 3
    text(torch.arange(7))
    assert sum(seen) == 3


def test_the_vectors_of_the_catalogue_are_white(frozen, tiny_encoder):
    vector, _ = frozen(torch.tensor([2, 3, 5]))
    torch.testing.assert_close(vector.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    raw = torch.stack([by_hand(tiny_encoder, TEXTS[place]) for place in (0, 1, 3)])
    before, after = (torch.linalg.svdvals(v - v.mean(0)).square()[:2] / 3 for v in (raw, vector))
    assert before[0] > 1.2 * before[1]  # three texts vary along two directions, along one more than the other
    assert ((after > 0.95) & (after < 1)).all()


def test_an_item_without_text_is_masked(frozen):
    vector, present = frozen(torch.arange(7))
    assert present.tolist() == [False, False, True, True, False, True, True]
    assert (vector[~present] == 0).all()


def test_a_text_alone_and_among_longer_ones_is_the_same(frozen):
    vector, _ = frozen(torch.tensor([3]))
    torch.testing.assert_close(frozen.embed(["title: b"]), vector, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(frozen.embed(["title: b", TEXTS[3]])[:1], vector, atol=1e-5, rtol=1e-4)


def test_live_texts_have_their_gradient_and_the_value_of_the_last_refresh(tiny_encoder):
    text = encoder(tiny_encoder, tune="full")
    before, item, towards = text.cache.clone(), torch.tensor([3, 2, 5]), torch.randn(3, 32)
    with torch.no_grad():
        for parameter in text.encoder.parameters():
            parameter.mul_(1.1)
    row = text.text_of[item]
    fresh = text._standard(text.encode(text.ids[row], text.size[row]))
    assert not torch.allclose(fresh, before[row], atol=1e-3)
    weight = text.encoder.embeddings.word_embeddings.weight
    expected = torch.autograd.grad((fresh * towards).sum(), weight)[0]
    vector, _ = text(item, text.choose_live(item, torch.arange(0), torch.Generator().manual_seed(0)))
    assert torch.equal(vector, before[row]) and torch.equal(text.cache, before)
    torch.testing.assert_close(torch.autograd.grad((vector * towards).sum(), weight)[0], expected)


def test_some_texts_have_on_average_the_gradient_of_all(tiny_encoder):
    text, draw = encoder(tiny_encoder, tune="full", live=2), torch.Generator().manual_seed(0)
    item, others, towards = torch.tensor([3, 2]), torch.arange(7), torch.randn(7, 32)
    weight = text.encoder.embeddings.word_embeddings.weight

    def gradient(live):
        vector, _ = text(others, live)
        return torch.autograd.grad((vector * towards).sum(), weight)[0]

    every = gradient(Live(torch.arange(3), torch.ones(3)))
    some = torch.stack([gradient(text.choose_live(item, others, draw)) for _ in range(400)])
    assert (some[0] - every).norm() > 0.1 * every.norm()
    assert (some.mean(0) - every).norm() < 0.1 * every.norm()


def test_at_most_so_many_live_texts_and_never_none(tiny_encoder):
    text, draw = encoder(tiny_encoder, tune="full", live=2), torch.Generator().manual_seed(0)
    nothing = torch.arange(0)
    live = text.choose_live(torch.arange(7), nothing, draw)
    assert len(live.row.unique()) == 2 and live.weight.tolist() == [1.5, 1.5]
    assert text.choose_live(torch.tensor([0, 4]), nothing, draw).row.tolist() == [0]


def test_half_of_the_live_texts_are_of_items_that_are_only_scored_against(tiny_encoder):
    text, draw = encoder(tiny_encoder, tune="full", live=2), torch.Generator().manual_seed(0)
    live = text.choose_live(torch.tensor([3, 6, 2]), torch.arange(7), draw)
    first, rest = live.row.tolist()
    assert first in text.text_of[[3, 2]] and rest == text.text_of[5] and live.weight.tolist() == [2, 1]
    wide = encoder(tiny_encoder, tune="full", live=9).choose_live(torch.tensor([3]), torch.arange(7), draw)
    assert sorted(wide.row.tolist()) == [0, 1, 2] and wide.weight.tolist() == [1, 1, 1]


def test_no_text_at_all(tiny_encoder):
    text = TextEncoder(TextEncoderConfig(path=str(tiny_encoder)), [None, None])
    text.refresh()
    vector, present = text(torch.arange(4))
    assert vector.shape == (4, 32) and bool(vector.isfinite().all()) and not present.any()


def test_embed_reads_each_distinct_text_once(frozen, monkeypatch):
    seen, encode = [], frozen.encode
    monkeypatch.setattr(frozen, "encode", lambda ids, size: seen.append(len(ids)) or encode(ids, size))
    vector = frozen.embed(["title: b", "new", "title: b", "new"])
    assert seen == [2] and torch.equal(vector[:2], vector[2:]) and not torch.equal(vector[0], vector[1])


def test_a_step_encodes_its_live_texts_once_and_no_other(tiny_encoder, monkeypatch):
    text, seen = encoder(tiny_encoder, tune="full"), []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda ids, size: seen.append(len(ids)) or encode(ids, size))
    item = torch.tensor([3, 6, 3, 2, 6])  # the texts of 3 and 6 are the same
    text(item, text.choose_live(item, torch.arange(0), torch.Generator().manual_seed(0)))
    assert seen == [2]
