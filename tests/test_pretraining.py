from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from mvrec_core import checkpoint, pretraining
from mvrec_core.batch import collate
from mvrec_core.catalog import FIRST
from mvrec_core.errors import CheckpointError, ConfigError, DataError
from mvrec_core.masked_tokens import MaskedTokens, mask_tokens
from mvrec_core.pretext import HIDDEN, TEMPERATURE, Pretext, contrast, tell_values
from mvrec_core.pretrained import load
from mvrec_core.pretraining import pretrain
from mvrec_core.sealed import verify
from mvrec_core.sequences import TRAIN, VALID
from mvrec_core.shards import Shards
from mvrec_core.text import TextEncoder
from mvrec_core.workers import Workers

PARTS = ("id", "text", "genres", "year", "rating", "time", "gender", "text~id", "text~next")


def pretext(encoder, data, *overrides):
    config = tiny.config(encoder, *overrides)
    histories = data.histories(config).before(VALID)
    model = checkpoint.new_model(config, data, Shards.whole(histories))
    if model.text is not None:
        model.text.refresh()
    return Pretext(model).train(), histories


def first_batch(histories, users=24):
    return collate(histories, pretraining._windows(histories, 8)[:users])


@pytest.fixture(scope="module")
def pretrained(tiny_encoder, plain_data, tmp_path_factory):
    """The configuration, the directory and the epochs of a run with three epochs of each kind."""
    config = tiny.config(tiny_encoder, "pretrain.epochs=3", "pretrain.text_epochs=3", "model.text.lr=3e-3")
    directory = tmp_path_factory.mktemp("run") / "pretrained"
    return config, directory, list(pretrain(config, plain_data, Workers(), directory))


# histories


def test_only_train_events_are_left(plain_data, plain_config):
    histories = plain_data.histories(plain_config)
    train = histories.before(VALID)
    assert len(train) == len(histories) and set(train.split) == {TRAIN}
    for user in (0, 50, 101, len(train) - 1):
        rows = histories.events_of(user)
        kept = histories.split[rows] == TRAIN
        assert train.item[train.events_of(user)].tolist() == histories.item[rows][kept].tolist()
        assert train.event["time"][train.events_of(user)].tolist() == histories.event["time"][rows][kept].tolist()


def test_windows_hold_every_event_once(plain_data, plain_config):
    histories = plain_data.histories(plain_config).before(VALID)
    for draw in (None, np.random.default_rng(3)):
        windows = pretraining._windows(histories, 4, draw)
        rows = [
            histories.offsets[u] + np.arange(a, b)
            for u, a, b in zip(windows.user, windows.start, windows.stop, strict=True)
        ]
        assert np.sort(np.concatenate(rows)).tolist() == list(range(len(histories.item)))
        assert max(map(len, rows)) == 4


def test_validation_and_test_events_change_nothing(tiny_encoder, plain_data, tmp_path):
    config = tiny.config(tiny_encoder, "pretrain.epochs=1")
    users = plain_data.users
    item = [
        [i if s == TRAIN else "i00" for i, s in zip(*pair, strict=True)]
        for pair in zip(users["item"].to_pylist(), users["split"].to_pylist(), strict=True)
    ]
    time = [
        [t if s == TRAIN else t + 10**12 for t, s in zip(*pair, strict=True)]
        for pair in zip(users["timestamp"].to_pylist(), users["split"].to_pylist(), strict=True)
    ]
    other = users
    for name, values in (("item", item), ("timestamp", time), ("event.time", time)):
        place = other.schema.get_field_index(name)
        other = other.set_column(place, name, [values])
    assert other["item"].to_pylist() != users["item"].to_pylist()
    for name, table in (("a", users), ("b", other)):
        list(pretrain(config, dataclasses.replace(plain_data, users=table), Workers(), tmp_path / name))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# hiding


def test_a_hidden_view_is_gone_at_its_step_and_nowhere_else(tiny_encoder, plain_data):
    task, histories = pretext(tiny_encoder, plain_data)
    batch = first_batch(histories)
    needed, row = batch.item.unique(return_inverse=True)
    views = task.model.item_views(needed)
    hidden, profile = task._choose(batch, views, row, torch.Generator().manual_seed(1))
    told, more, moved = task._hide(batch, views, row, hidden, profile)
    names = task._step_views
    for place, name in enumerate(names[:4]):  # of items
        before, after = views.present[row][..., place], more.present[moved][..., place]
        assert torch.equal(after, before & (hidden != place)) and (before != after).any(), name
        assert torch.equal(more.z[moved], views.z[row])
    rating, time = hidden == names.index("rating"), hidden == names.index("time")
    assert torch.equal(told.event["rating"].isnan(), batch.event["rating"].isnan() | rating) and rating.any()
    assert torch.equal(told.event["time"] != batch.event["time"], time) and time.any()
    gender = profile == 0
    assert torch.equal((told.user["gender"] == 0).all(1), gender) and 0 < gender.sum() < len(gender)
    assert told.item is batch.item and not batch.event["rating"][rating].isnan().any()


def test_a_step_loses_one_view_that_it_has_and_padding_none(tiny_encoder, plain_data):
    task, histories = pretext(tiny_encoder, plain_data)
    batch = first_batch(histories, 101)
    needed, row = batch.item.unique(return_inverse=True)
    hidden, _ = task._choose(batch, task.model.item_views(needed), row, torch.Generator().manual_seed(0))
    real = batch.item >= FIRST
    assert (hidden[batch.item == 0] == -1).all()
    assert abs(float((hidden[real] >= 0).float().mean()) - HIDDEN) < 0.05
    no_text = batch.item == FIRST + 7
    assert no_text.any() and not torch.isin(hidden[no_text], torch.tensor([1, 2])).any()  # nor genres


# losses


def test_contrast_is_the_cross_entropy_of_cosines():
    query, key = torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    weights = torch.tensor([1.0, 0.0, -1.0]).div(TEMPERATURE).exp()
    expected = -(weights[1] / weights.sum()).log()
    torch.testing.assert_close(contrast(query, key, torch.tensor([1])), expected)


def test_the_same_value_is_no_negative():
    query, key = torch.randn(3, 4), torch.randn(3, 4)
    target, same = torch.tensor([0, 1, 2]), torch.tensor([7, 7, 8])
    left = contrast(query, key, target, same[target, None] == same)
    alone = [contrast(query[i : i + 1], key[[i, 2]], torch.tensor([0])) for i in (0, 1)]
    last = contrast(query[2:], key, torch.tensor([2]))
    torch.testing.assert_close(left, (sum(alone) + last) / 3)


def test_each_value_of_a_category_counts_and_unknown_ones_do_not():
    query, table = torch.randn(2, 4), torch.randn(FIRST + 3, 4)
    one = [contrast(query[:1], table[FIRST:], torch.tensor([v])) for v in (0, 2)]
    values = torch.tensor([[FIRST, FIRST + 2, 0], [1, 0, 0]])
    torch.testing.assert_close(tell_values(query, table, values), sum(one) / 2)
    assert tell_values(query, table, torch.tensor([[1], [0]])) == 0


def test_every_view_has_a_loss_and_every_parameter_a_gradient(tiny_encoder, plain_data):
    for tune in ("frozen", "full"):
        task, histories = pretext(tiny_encoder, plain_data, f"model.text.tune={tune}")
        loss, parts, there = task(first_batch(histories, 101), torch.Generator().manual_seed(0))
        assert tuple(task.parts) == PARTS and there.all() and (parts > 0).all()
        torch.testing.assert_close(loss.detach(), parts.sum())
        loss.backward()
        assert [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
        moved = {n for n, p in task.model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0}
        assert {"fusion.A", "start", "encoders.id.embedding.weight", "encoders.text.weight"} <= moved
        assert any(name.startswith("text.encoder") for name in moved) == (tune == "full")


@pytest.mark.parametrize(
    "views", ["{id: {kind: id}}", "{id: {kind: id}, time: {kind: time}}", "{text: {kind: text, columns: [title]}}"]
)
def test_views_may_be_few(tiny_encoder, plain_data, views):
    task, histories = pretext(tiny_encoder, plain_data, f"views={views}")
    loss, _, _ = task(first_batch(histories, 2), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_a_hidden_year_does_not_reach_the_guess(tiny_encoder, plain_data):
    task, histories = pretext(tiny_encoder, plain_data)
    task.eval()
    batch = first_batch(histories)
    needed, row = batch.item.unique(return_inverse=True)
    hidden = torch.full_like(row, -1)
    hidden[7, 2] = task._step_views.index("year")
    profile = torch.full((len(row),), -1)

    def state():
        views = task.model.item_views(needed)
        with torch.no_grad():
            return task.model.user_vectors(*task._hide(batch, views, row, hidden, profile))[7, 1:]

    before = state()
    year = task.model.feature_year
    year[batch.item[7, 2]] = 3.0
    assert torch.equal(state()[:3], before[:3])
    year[batch.item[7, 1]] = 3.0
    assert not torch.equal(state()[:3], before[:3])


# masked tokens


def test_masks_are_15_percent_and_80_10_10():
    ids = torch.randint(10, 1000, (200, 100), generator=torch.Generator().manual_seed(0))
    open_ = torch.ones_like(ids, dtype=torch.bool)
    open_[:, 0] = False
    masked, chosen = mask_tokens(ids, open_, 4, 1000, torch.Generator().manual_seed(1))
    assert torch.equal(masked[~chosen], ids[~chosen]) and not chosen[:, 0].any()
    assert abs(float(chosen[:, 1:].float().mean()) - 0.15) < 0.01
    became, was = masked[chosen], ids[chosen]
    assert abs(float((became == 4).float().mean()) - 0.8) < 0.03
    assert abs(float((became == was).float().mean()) - 0.1) < 0.02


def test_special_tokens_are_not_asked_for(tiny_encoder, plain_config):
    text = TextEncoder(plain_config.model.text.model_copy(update={"tune": "full"}), ["film number 1", "film"])
    task = MaskedTokens(text).train()
    generator = torch.Generator().manual_seed(0)
    loss = sum(task(torch.tensor([0, 1]), generator) for _ in range(20))
    loss.backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    assert task.bias.grad[task.special].max() >= 0  # never a target, so only ever pushed down


def test_a_tokenizer_without_a_mask(tiny_encoder, plain_config):
    text = TextEncoder(plain_config.model.text, ["film"])
    text.tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="no mask token, which pretrain.text_epochs needs"):
        MaskedTokens(text)


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        ((), 0),
        (("model.text.tune=lora",), pretraining.TEXT_EPOCHS),
        (("model.text.tune=lora", "pretrain.text_epochs=0"), 0),
        (("pretrain.text_epochs=2",), 2),
        (("pretrain.text_epochs=2", "views={id: {kind: id}}"), 0),
    ],
)
def test_when_texts_are_read(tiny_encoder, overrides, epochs):
    assert pretraining.text_epochs(tiny.config(tiny_encoder, *overrides)) == epochs


# the whole


def test_losses_fall_and_are_written(pretrained):
    _, directory, epochs = pretrained
    told = [(e.phase, e.number, e.of, e.last) for e in epochs]
    assert told == [("text", n, 3, False) for n in (1, 2, 3)] + [("views", n, 3, n == 3) for n in (1, 2, 3)]
    assert epochs[2].losses["masked tokens"] < 0.95 * epochs[0].losses["masked tokens"]
    first, last = epochs[3].losses, epochs[5].losses
    assert tuple(first) == PARTS and sum(last.values()) < 0.9 * sum(first.values())
    assert last["id"] < first["id"] and last["text~id"] < first["text~id"]
    written = json.loads((directory / "losses.json").read_text())
    assert written == {"text": [e.losses for e in epochs[:3]], "views": [e.losses for e in epochs[3:]]}


def test_the_directory_is_sealed(pretrained):
    _, directory, _ = pretrained
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert there == {*verify(directory)["files"], "manifest.json"}
    assert {"model.safetensors", "losses.json", "views.json", "text_encoder/model.safetensors"} <= there


def test_training_starts_from_what_was_pretrained(pretrained, plain_data, tiny_encoder):
    config, directory, _ = pretrained
    histories = plain_data.histories(config)
    model = load(directory, config, plain_data, Shards.whole(histories))
    scratch = checkpoint.new_model(config, plain_data, Shards.whole(histories))
    weights = load_file(directory / "model.safetensors")
    left = set(dict(model.named_parameters())) - set(weights)
    assert {name for name in left if not name.startswith("text.encoder.")} == {"log_tau", "bias"}
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value), name
    changed = {n for n in weights if not torch.equal(model.get_parameter(n), scratch.get_parameter(n))}
    assert {"fusion.A", *(n for n in weights if n.startswith("encoders."))} <= changed
    assert torch.equal(model.known, scratch.known) and torch.equal(model.popularity, scratch.popularity)
    adapted = load_file(directory / "text_encoder" / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(model.text.encoder.get_parameter(words), adapted[words])
    assert not torch.equal(scratch.text.encoder.get_parameter(words), adapted[words])


@pytest.mark.parametrize("tune", ["frozen", "lora"])
def test_the_same_seed_gives_the_same_bits(tiny_encoder, plain_data, tmp_path, tune):
    versions = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny.config(tiny_encoder, f"model.text.tune={tune}", "pretrain.epochs=1", f"seed={seed}")
        list(pretrain(config, plain_data, Workers(), tmp_path / name))
        versions.append(verify(tmp_path / name)["model_version"])
    assert versions[0] == versions[1] != versions[2]
    assert (tmp_path / "a" / "text_encoder").exists() == (tune == "lora")


def refused(directory, encoder, data, *overrides):
    config = tiny.config(encoder, *overrides)
    with pytest.raises(CheckpointError) as error:
        load(directory, config, data, data.shards(config))
    return str(error.value).removeprefix(f"{directory}: ")


AGAIN = "; run 'mvrec pretrain --overwrite' with this configuration"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dim=8", "view 'gender': encoders.gender.embedding.weight: expected (4, 8), found (4, 16)"),
        ("model.blocks=2", "sequence.blocks.1.feed.0.bias: expected (64,), found nothing"),
        ("views.genres.column=genre", "view 'genres': column: expected genre, found genres"),
        ("views.more={kind: category, level: user, column: gender}", "view 'more': expected a view, found nothing"),
        ("views={id: {kind: id}}", "view 'text': expected nothing, found a view"),
    ],
)
def test_what_does_not_fit_names_the_view(pretrained, tiny_encoder, plain_data, override, message):
    _, directory, _ = pretrained
    if "more" in override:
        plain_data = dataclasses.replace(
            plain_data,
            fitted=dataclasses.replace(
                plain_data.fitted,
                vocabularies={**plain_data.fitted.vocabularies, "more": plain_data.fitted.vocabularies["gender"]},
            ),
            users=plain_data.users.append_column("user.more", plain_data.users["user.gender"]),
        )
    assert refused(directory, tiny_encoder, plain_data, override) == message + AGAIN


def test_another_catalogue_is_refused_though_it_is_as_large(pretrained, tiny_encoder, plain_data):
    _, directory, _ = pretrained
    table = plain_data.catalog.table
    turned = dataclasses.replace(plain_data.catalog, table=table.take([1, 0, *range(2, tiny.ITEMS)]))
    other = dataclasses.replace(plain_data, catalog=turned)
    assert refused(directory, tiny_encoder, other).startswith("view 'id': values: expected ")


def test_nothing_pretrained_and_damage(pretrained, tiny_encoder, plain_data, tmp_path):
    assert refused(tmp_path / "no", tiny_encoder, plain_data).startswith("nothing is pretrained; run 'mvrec pretrain'")
    copy = shutil.copytree(pretrained[1], tmp_path / "copy")
    (copy / "losses.json").write_text("{}")
    assert "damaged: expected sha256" in refused(copy, tiny_encoder, plain_data)


def test_what_cannot_be_pretrained(tiny_encoder, plain_data, tmp_path):
    linear = tiny.config(tiny_encoder, "model.fusion=linear")
    with pytest.raises(ConfigError, match="^model.fusion: pretraining needs 'gated', found 'linear'"):
        next(pretrain(linear, plain_data, Workers(), tmp_path / "a"))
    with pytest.raises(DataError, match="500 workers need as many histories and a batch_size as large"):
        next(pretrain(tiny.config(tiny_encoder), plain_data, Workers(0, 500), tmp_path / "a"))
