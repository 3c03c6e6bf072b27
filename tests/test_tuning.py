"""The tuning modes: what learns, one step, and what is left of it in a saved encoder."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXTS

from mvrec_core import tuning
from mvrec_core.config import TextEncoderConfig
from mvrec_core.errors import ConfigError
from mvrec_core.reading import parse_config
from mvrec_core.text import TextEncoder

MODES = ["frozen", "last_n", "lora", "adalora", "adapter", "full"]
LEARNING = MODES[1:]
FORBIDDEN = ("full", "adapter")  # there is nothing that such an adapter could leave out
H, LAYERS, RANK = 32, 2, 2  # of the tiny encoder


def encoder(path, **settings):
    torch.manual_seed(0)
    text = TextEncoder(TextEncoderConfig(path=str(path), max_tokens=32, rank=RANK, **settings), TEXTS)
    text.refresh()
    return text.eval()


def learn(text, steps=1, lr=0.05):
    """Steps of AdamW that push the vectors of the live texts towards the same point; then the cache is new."""
    optimiser = torch.optim.AdamW([p for p in text.parameters() if p.requires_grad], lr)
    text.attach(optimiser, steps)
    for _ in range(steps):
        live = text.choose_live(torch.arange(7), torch.arange(0), torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        (text(torch.arange(7), live)[0][2:] - 1).pow(2).mean().backward()
        optimiser.step()
    text.refresh()
    return text


def learning(text):
    return {name: p.numel() for name, p in text.encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("tune", "count", "part"),
    [
        ("last_n", 16, "encoder.layer.1."),
        ("lora", LAYERS * 2 * 2, ".lora_"),
        ("adalora", LAYERS * 2 * 3, ".lora_"),
        ("adapter", LAYERS * 4, ".output.dense.adapter."),
        ("full", 5 + LAYERS * 16, ""),
        ("frozen", 0, ""),
    ],
)
def test_a_mode_trains_its_parameters_and_no_other(tiny_encoder, tune, count, part):
    text = encoder(tiny_encoder, tune=tune)
    names = learning(text)
    assert len(names) == count and all(part in name for name in names)
    if count:
        live = text.choose_live(torch.arange(7), torch.arange(0), torch.Generator().manual_seed(0))
        text(torch.arange(7), live)[0].sum().backward()
    assert {name for name, p in text.encoder.named_parameters() if p.grad is not None} == set(names)


@pytest.mark.parametrize(
    ("tune", "numbers"),
    [
        ("lora", LAYERS * 2 * (2 * H * RANK)),
        ("adalora", LAYERS * 2 * (2 * H * (RANK + 1) + RANK + 1)),  # it starts at half as many ranks again
        ("adapter", LAYERS * (2 * H * RANK + RANK + H)),
    ],
)
def test_how_many_numbers_learn(tiny_encoder, tune, numbers):
    assert sum(learning(encoder(tiny_encoder, tune=tune)).values()) == numbers


@pytest.mark.parametrize("tune", ["lora", "adalora", "adapter"])
def test_what_is_added_changes_nothing_at_first(tiny_encoder, tune):
    torch.testing.assert_close(encoder(tiny_encoder, tune=tune).cache, encoder(tiny_encoder).cache)


@pytest.mark.parametrize("tune", LEARNING)
def test_one_step_changes_the_vectors_and_leaves_what_is_frozen(tiny_encoder, tune):
    text = encoder(tiny_encoder, tune=tune)
    before, cache = {k: v.clone() for k, v in text.encoder.state_dict().items()}, text.cache.clone()
    learn(text)
    after = text.encoder.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} <= set(learning(text))
    assert float((text.cache - cache).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("tune", "save"), [(tune, save) for tune in MODES for save in ("whole", "adapter") if (tune, save) != FORBIDDEN]
)
def test_a_saved_encoder_gives_the_same_vectors(tiny_encoder, tmp_path, tune, save):
    text = encoder(tiny_encoder, tune=tune, save=save)
    if tune != "frozen":
        learn(text, 3)
        assert float((text.cache - encoder(tiny_encoder).cache).abs().max()) > 1e-4
    text.save(tmp_path / "saved")
    again = encoder(tmp_path / "saved")
    assert not learning(again) and not any("lora" in name for name in again.encoder.state_dict())
    torch.testing.assert_close(again.cache, text.cache, atol=1e-5, rtol=0)
    again.save(tmp_path / "twice")  # and what was loaded can be saved
    assert torch.equal(encoder(tmp_path / "twice").cache, again.cache)


@pytest.mark.parametrize("tune", ["last_n", "lora", "adalora", "adapter"])
def test_an_adapter_holds_what_was_learnt_and_is_small(tiny_encoder, tmp_path, tune):
    text = learn(encoder(tiny_encoder, tune=tune, save="adapter"), 2)
    text.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / tuning.WEIGHTS)
    assert {name: value.numel() for name, value in weights.items()} == learning(text)
    parameters = dict(text.encoder.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in weights.items())
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    tree = json.loads((tmp_path / "saved" / tuning.ADAPTER).read_text())
    assert tree["base"] == {"path": str(tiny_encoder), "sha256": tuning.fingerprint(encoder(tiny_encoder).encoder)}


def test_an_adapter_on_another_base(tiny_encoder, tmp_path):
    base = shutil.copytree(tiny_encoder, tmp_path / "base")
    learn(encoder(base, tune="lora", save="adapter")).save(tmp_path / "saved")
    other = encoder(base, tune="full")
    learn(other).encoder.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"needs the base encoder '.*base' with sha256 \w{12}…, found \w{12}…$"):
        encoder(tmp_path / "saved")
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"adapter.json: needs the base encoder .*, found no such directory$"):
        encoder(tmp_path / "saved")


@pytest.mark.parametrize("first", ["lora", "adapter"])
@pytest.mark.parametrize("then", LEARNING)
def test_a_saved_encoder_can_learn_on(tiny_encoder, tmp_path, first, then):
    text = learn(encoder(tiny_encoder, tune=first), 2)
    text.save(tmp_path / "one")
    again = encoder(tmp_path / "one", tune=then)
    torch.testing.assert_close(again.cache, text.cache, atol=1e-5, rtol=0)
    learn(again, 2).save(tmp_path / "two")
    torch.testing.assert_close(encoder(tmp_path / "two").cache, again.cache, atol=1e-5, rtol=0)


def test_adalora_shares_out_its_ranks(tiny_encoder, tmp_path):
    text = encoder(tiny_encoder, tune="adalora", save="adapter")
    used = lambda: sum(sum(row) for row in tuning.ranks(text.encoder).values())  # noqa: E731
    start = LAYERS * 2 * (RANK + 1)
    optimiser = torch.optim.AdamW([p for p in text.parameters() if p.requires_grad], 0.01)
    text.attach(optimiser, 20)
    seen = []
    for _ in range(20):
        live = text.choose_live(torch.arange(7), torch.arange(0), torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        (text(torch.arange(7), live)[0][2:] - 1).pow(2).mean().backward()
        optimiser.step()
        seen.append(used())
    assert seen[1] == start and seen[-6:] == [LAYERS * 2 * RANK] * 6  # on average the configured rank
    assert all(later <= earlier for earlier, later in zip(seen[1:], seen[2:], strict=False))
    text.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / tuning.ADAPTER).read_text())["ranks"]
    assert kept == tuning.ranks(text.encoder) and sum(map(sum, kept.values())) == LAYERS * 2 * RANK


def test_adalora_keeps_its_vectors_near_orthogonal(tiny_encoder):
    text = encoder(tiny_encoder, tune="adalora")
    vectors = [p for name, p in text.encoder.named_parameters() if "lora_A" in name or "lora_B" in name]
    before = sum(float(tuning._skew(p.detach())) for p in vectors)
    learn(text, 20)
    assert sum(float(tuning._skew(p.detach())) for p in vectors) < before / 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adalora_in_a_training_of_a_few_steps(tiny_encoder, steps):
    text = encoder(tiny_encoder, tune="adalora")
    assert bool(learn(text, steps).cache.isfinite().all())
    learn(text, steps)  # and in one that is longer than was told


def test_a_directory_that_holds_no_model(tmp_path):
    with pytest.raises(ConfigError, match="expected a directory of a BERT-family model with config.json, found"):
        encoder(tmp_path)


@pytest.mark.parametrize("tune", ["full", "lora", "adapter"])
def test_compiled_layers_learn_the_same(tiny_encoder, tmp_path, monkeypatch, tune):
    traced = []

    def backend(graph, inputs):  # takes what is to be compiled as it is: a compiler need not be here
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    expected = learn(encoder(tiny_encoder, tune=tune), steps=2)
    assert not traced
    text = learn(encoder(tiny_encoder, tune=tune, compile=True), steps=2)
    assert 0 < len(traced) < 2 * LAYERS * 3  # of a layer as it learns and as it is read, not of each layer and shape
    torch.testing.assert_close(text.cache, expected.cache, atol=1e-5, rtol=1e-5)
    text.save(tmp_path / "saved")
    torch.testing.assert_close(encoder(tmp_path / "saved").cache, expected.cache, atol=1e-5, rtol=1e-5)


def test_compiling_needs_a_compiler(tiny_encoder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="^model.text.compile: expected a C compiler on this machine .*, found none$"):
        encoder(tiny_encoder, tune="full", compile=True)
    assert encoder(tiny_encoder, tune="full").cache.any()


def test_more_layers_than_there_are(tiny_encoder):
    with pytest.raises(ConfigError, match="at most the encoder's 2 layers, found 3"):
        encoder(tiny_encoder, tune="last_n", last_n=3)


@pytest.mark.parametrize(
    "settings", [*({"tune": tune} for tune in ("last_n", "lora", "adalora", "adapter")), {"compile": True}]
)
def test_a_model_of_other_layers(tiny_encoder, tmp_path, monkeypatch, settings):
    from transformers import DistilBertConfig, DistilBertModel

    directory = shutil.copytree(tiny_encoder, tmp_path / "distil")
    DistilBertModel(DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(directory)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match="^model.text.tune: .*DistilBertModel"):
        encoder(directory, **settings)


def test_an_adapter_of_everything_is_refused():
    tree = {"name": "a", "data": {"events": {"path": "e"}}, "views": {"id": {"kind": "id"}}}
    with pytest.raises(
        ConfigError, match="model.text: save: adapter leaves out what was not learnt, and with tune: full"
    ):
        parse_config(tree | {"model": {"text": {"tune": "full", "save": "adapter"}}}, "here")
