from __future__ import annotations

import pytest
import torch
from tiny import TEXTS

from mvrec_core.config import TextEncoderConfig
from mvrec_core.text import Live, TextEncoder
from mvrec_core.workers import Workers

LIVE = Live(torch.tensor([2, 0]), torch.tensor([1.0, 2.0]))


def encoder(path, **settings):
    torch.manual_seed(0)
    text = TextEncoder(TextEncoderConfig(path=str(path), max_tokens=32, tune="last_n", last_n=1, **settings), TEXTS)
    return text.train()


def runs(text):
    """How often the frozen layer, and the one that learns, have run, and on how many texts, from now on."""
    counts = {"frozen": [], "learns": []}
    for name, layer in zip(counts, text.encoder.encoder.layer, strict=True):
        layer.register_forward_hook(lambda module, read, out, seen=counts[name]: seen.append(len(read[0])))
    return counts


def slopes(text):
    torch.manual_seed(7)  # of the dropout in the layer that learns
    text(torch.arange(7), LIVE)[0].pow(2).sum().backward()
    return {name: p.grad for name, p in text.encoder.named_parameters() if p.grad is not None}


def test_what_is_kept_gives_the_vectors_and_gradients_of_all_layers(tiny_encoder):
    whole, kept = encoder(tiny_encoder), encoder(tiny_encoder)
    kept.keep_frozen()
    whole.refresh()
    kept.refresh()
    assert kept.below is not None and whole.below is None
    torch.testing.assert_close(kept.cache, whole.cache, atol=1e-4, rtol=1e-4)
    expected, found = slopes(whole), slopes(kept)
    assert found.keys() == expected.keys() and all("encoder.layer.1." in name for name in found)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, atol=1e-4, rtol=1e-3)


def test_frozen_layers_run_once_for_each_text_and_never_again(tiny_encoder):
    text = encoder(tiny_encoder)
    counts = runs(text)
    text.keep_frozen()
    assert counts == {"frozen": [3], "learns": []}
    text.refresh()
    slopes(text)
    assert counts == {"frozen": [3], "learns": [3, 2]}


def test_texts_that_are_not_of_the_catalogue_pass_all_layers(tiny_encoder):
    text = encoder(tiny_encoder)
    text.keep_frozen()
    text.refresh()
    counts = runs(text.eval())
    torch.testing.assert_close(text.embed(TEXTS[:1])[0], text.cache[text.text_of[2]], atol=1e-4, rtol=1e-4)
    assert counts == {"frozen": [1], "learns": [1]}


def test_what_would_take_too_much_memory_is_not_kept(tiny_encoder):
    tokens = int(encoder(tiny_encoder).size.sum())
    for megabytes, there in ((4e-6 * tokens * 32, True), (4e-6 * (tokens - 1) * 32, False)):
        text = encoder(tiny_encoder, keep_mb=megabytes)
        text.keep_frozen()
        assert (text.below is not None) == there


@pytest.mark.parametrize("settings", [{"last_n": 2}, {"tune": "full"}, {"tune": "frozen"}])
def test_where_no_layer_is_frozen_below_one_that_learns_nothing_is_kept(tiny_encoder, settings):
    text = TextEncoder(TextEncoderConfig(**{"path": str(tiny_encoder), "tune": "last_n", **settings}), TEXTS)
    text.keep_frozen()
    assert text.below is None


def test_workers_share_out_what_is_read_to_be_kept(tiny_encoder, monkeypatch):
    monkeypatch.setattr("mvrec_core.text.CHUNK", 1)
    whole, parts = encoder(tiny_encoder), []
    whole.keep_frozen()
    for rank in range(2):
        encoder(tiny_encoder).keep_frozen(Workers(rank, 2, add=lambda mine: parts.append(mine.clone()) or mine))
    text = encoder(tiny_encoder)
    text.keep_frozen(Workers(0, 2, add=lambda mine: mine + parts[1]))
    assert not torch.equal(parts[0], parts[0] + parts[1]) and not torch.equal(parts[1], parts[0] + parts[1])
    for one in (whole, text):
        one.refresh()
    assert torch.equal(text.cache, whole.cache)


def test_only_layers_that_learn_have_dropout(tiny_encoder):
    text = encoder(tiny_encoder)
    below, above = text.encoder.encoder.layer
    assert not text.encoder.embeddings.training and not below.training and above.training
    assert all(module.training for module in above.modules())
    assert not any(module.training for module in text.eval().modules())
