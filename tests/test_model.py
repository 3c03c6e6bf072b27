from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from mvrec_core.batch import collate
from mvrec_core.catalog import FIRST, Catalog, Vocabulary
from mvrec_core.checkpoint import Data, new_model
from mvrec_core.encoders import GAPS
from mvrec_core.errors import ConfigError
from mvrec_core.features import MISSING_TIME, Fitted
from mvrec_core.ranking import catalogue
from mvrec_core.sequences import Examples, train_examples
from mvrec_core.shards import Shards

LOSSES = ("softmax", "sampled_softmax", "bce", "gbce")


def build(encoder, data, *overrides):
    config = tiny.config(encoder, *overrides)
    model = new_model(config, data, data.shards(config))
    if model.text is not None:
        model.text.refresh()
    if model.until is not None:
        model.until.longest.fill_(GAPS - 2)  # as if training had seen every gap
    return model


def vectors(model, histories, examples):
    """[B, T, D] as evaluation computes them."""
    batch = collate(histories, examples)
    with torch.no_grad():
        return model.user_vectors(batch, catalogue(model)[0], batch.item)


def read(*pairs):
    """Each user's first `stop` events, with no target."""
    user, stop = (np.array(column) for column in zip(*pairs, strict=True))
    return Examples(user, np.zeros_like(stop), stop, stop, stop)


@pytest.mark.parametrize("settings", ["model.fusion=gated", "model.fusion=linear"])
def test_a_later_event_does_not_change_earlier_vectors(tiny_encoder, plain_data, settings):
    model = build(tiny_encoder, plain_data, settings)
    histories = plain_data.histories(model.config)
    user, at = 7, 4  # of 10 events
    row = int(histories.offsets[user]) + at
    item, time, rating = histories.item.copy(), histories.time.copy(), histories.event["rating"].copy()
    item[row], time[row], rating[row] = FIRST + 20, time[row] + 7_000_000_000, 2.0
    event = {"rating": rating, "time": time}
    changed = dataclasses.replace(histories, item=item, time=time, event=event)
    whole = read((user, 8))
    before, after = vectors(model, histories, whole)[0], vectors(model, changed, whole)[0]
    torch.testing.assert_close(after[: at + 1], before[: at + 1], atol=1e-6, rtol=0)
    assert (after[at + 1 :] - before[at + 1 :]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("settings", ["model.fusion=gated", "model.fusion=linear", "model.blocks=0"])
def test_the_last_vectors_are_those_of_all(tiny_encoder, plain_data, settings):
    model = build(tiny_encoder, plain_data, "model.blocks=2", settings).eval()
    histories = plain_data.histories(model.config)
    examples = read((7, 8), (4, 0), (3, 5))
    batch = collate(histories, examples)
    with torch.no_grad():
        last = model.last_vectors(batch, catalogue(model)[0], batch.item)
    every = vectors(model, histories, examples)
    torch.testing.assert_close(last, torch.stack([every[0, 8], every[1, 0], every[2, 5]]), atol=1e-6, rtol=0)


def test_when_the_next_event_is_asked_for_counts_once_known(tiny_encoder, plain_data):
    model = build(tiny_encoder, plain_data)
    histories = plain_data.histories(model.config)
    user, at = 7, 4
    time = histories.time.copy()
    time[int(histories.offsets[user]) + at :] += 30 * 86_400_000_000  # the user is away for a month
    away = dataclasses.replace(histories, time=time)
    before, after = (vectors(model, h, read((user, 8)))[0] for h in (histories, away))
    torch.testing.assert_close(after[:at], before[:at], atol=1e-6, rtol=0)
    assert (after[at] - before[at]).abs().max() > 1e-4


def test_a_request_that_does_not_say_when_is_as_a_missing_time(tiny_encoder, plain_data):
    model = build(tiny_encoder, plain_data)
    histories = plain_data.histories(model.config)
    user = 4
    whole = read((user, 7))  # all its events: what follows is not in the log
    unknown = vectors(model, histories, whole)[0, -1]
    asked = dataclasses.replace(histories, now=histories.time[histories.offsets[1:] - 1] + 3600_000_000)
    known = vectors(model, asked, whole)[0, -1]
    assert (known - unknown).abs().max() > 1e-4
    batch = collate(asked, whole)
    hidden = dataclasses.replace(batch, now=batch.now.clone())
    hidden.now[0, -1] = MISSING_TIME
    with torch.no_grad():
        assert torch.equal(model.user_vectors(hidden, catalogue(model)[0], batch.item)[0, -1], unknown)


def test_the_id_of_an_item_without_train_events_says_nothing(tiny_encoder, plain_data):
    config = tiny.config(tiny_encoder)
    histories = plain_data.histories(config)
    new = FIRST + 20
    item = np.where(histories.item == new, FIRST + 21, histories.item)
    model = new_model(config, plain_data, Shards.whole(dataclasses.replace(histories, item=item)))
    model.text.refresh()
    before = catalogue(model)[1].clone()
    with torch.no_grad():
        model.encoders["id"].embedding.weight += 1.0
    assert model.known.sum() == 39 and not model.known[:FIRST].any()
    for how in ("popularity", "uniform"):
        train = config.train.model_copy(update={"negatives_from": how})
        model.config = config.model_copy(update={"train": train})
        assert float(model._drawn_by()[new]) == 0 and model._drawn_by().count_nonzero() == 39
    after = catalogue(model)[1]
    assert torch.equal(after[new], before[new]) and float(before[new].norm()) > 0.99
    assert (after[new + 1 :] - before[new + 1 :]).abs().amax(-1).min() > 1e-3


def test_attention_falls_with_distance(tiny_encoder, plain_data):
    biases = []
    model = build(tiny_encoder, plain_data)
    model.sequence.blocks[0].register_forward_pre_hook(lambda _, given: biases.append(given[1]))
    histories = plain_data.histories(model.config)
    vectors(model, histories, read((7, 3)))
    expected = torch.tensor([[0.0, -torch.inf, -torch.inf], [-1.0, 0.0, -torch.inf], [-2.0, -1.0, 0.0]])
    assert biases[0].shape == (1, 2, 4, 4)
    torch.testing.assert_close(biases[0][0, 0, :3, :3], expected / 4)
    torch.testing.assert_close(biases[0][0, 1, :3, :3], expected / 32)


@pytest.mark.parametrize("settings", ["model.fusion=gated", "model.fusion=linear"])
def test_padding_changes_nothing(tiny_encoder, plain_data, settings):
    model = build(tiny_encoder, plain_data, settings)
    histories = plain_data.histories(model.config)
    together = vectors(model, histories, read((3, 2), (7, 8), (101, 0)))
    for place, (user, stop) in enumerate([(3, 2), (7, 8), (101, 0)]):
        alone = vectors(model, histories, read((user, stop)))[0]
        torch.testing.assert_close(together[place, : stop + 1], alone, atol=1e-5, rtol=0)


def test_a_user_who_does_nothing_is_the_profile(plain_model, plain_data):
    histories = plain_data.histories(plain_model.config)
    profiles = vectors(plain_model, histories, read((0, 0), (2, 0), (1, 0)))[:, 0]
    two_women, man = profiles.split([2, 1])
    torch.testing.assert_close(two_women[0], two_women[1])
    assert (two_women[0] - man[0]).abs().max() > 1e-3


def test_vectors_have_unit_length_and_rows_without_views_none(plain_model):
    views, items = catalogue(plain_model)
    torch.testing.assert_close(items.norm(dim=-1), torch.tensor([0.0, 0.0] + [1.0] * tiny.ITEMS))
    assert views.present[FIRST + 7].tolist() == [True, False, False, True]  # no title, no genres
    assert views.present[FIRST + 5].tolist() == [True, True, True, False]  # no year


def test_an_item_described_by_its_columns_is_the_item_but_for_its_id(plain_model, plain_data):
    views, _ = catalogue(plain_model)
    features = {name: getattr(plain_model, f"feature_{name}")[[FIRST]] for name in ("genres", "year")}
    with torch.no_grad():
        new = plain_model.new_item_views(features, [plain_data.catalog.table["text"][0].as_py()])
    torch.testing.assert_close(new.z[0, 1:], views.z[FIRST, 1:], atol=1e-5, rtol=1e-4)
    assert new.present.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("tune", ["frozen", "last_n", "lora", "adalora", "adapter", "full"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fusion", ["gated", "linear"])
def test_every_parameter_gets_a_gradient(tiny_encoder, plain_data, fusion, loss, tune):
    overrides = (f"model.fusion={fusion}", f"train.loss={loss}", f"model.text.tune={tune}")
    model = build(tiny_encoder, plain_data, *overrides).train()
    histories = plain_data.histories(model.config)
    batch = collate(histories, train_examples(histories, 8)[:24])
    model(batch, torch.Generator().manual_seed(0)).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()] == []
    assert any(name.startswith("text.") for name in trained) == (tune != "frozen")


@pytest.mark.parametrize("loss", LOSSES)
def test_views_may_be_few(tiny_encoder, plain_data, loss):
    model = build(tiny_encoder, plain_data, "views={id: {kind: id}}", f"train.loss={loss}").train()
    histories = plain_data.histories(model.config)
    model(collate(histories, train_examples(histories, 8)[:9]), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_same_seed_gives_the_same_model(tiny_encoder, plain_data):
    one, two, three = (build(tiny_encoder, plain_data, f"seed={seed}").state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["start"], three["start"])


@pytest.mark.parametrize(("source", "power"), [("popularity", 0.5), ("uniform", 0.0), ("batch", 1.0)])
def test_what_negatives_are_drawn_by(tiny_encoder, plain_data, source, power):
    model = build(
        tiny_encoder, plain_data, "train.loss=sampled_softmax", f"train.negatives_from={source}", "train.negatives=4000"
    )
    histories = plain_data.histories(model.config)
    target = torch.from_numpy(histories.item[(histories.split == 0) & (histories.item >= FIRST)])
    drawn = model._negatives(target, target[:0], torch.Generator().manual_seed(0)).bincount(minlength=model.n_rows)
    count = target.bincount(minlength=model.n_rows).double()
    assert drawn[:FIRST].tolist() == [0, 0] and int(drawn.sum()) == 4000
    expected = ((count + 1) ** power if source == "popularity" else count**power)[FIRST:]
    expected = 4000 * expected / expected.sum()
    assert ((drawn[FIRST:] - expected).abs() < 5 * expected.sqrt() + 1).all()
    share = model._drawn_by()[FIRST:].double()
    torch.testing.assert_close(share / share.sum(), expected / 4000, atol=1e-6, rtol=1e-4)


def test_more_items_than_can_be_drawn_from_by_popularity(tiny_encoder, plain_data, monkeypatch):
    monkeypatch.setattr("mvrec_core.model.MOST_DRAWN", 41)
    with pytest.raises(ConfigError, match=r"^train.negatives_from: 'popularity' draws from at most 41 rows, found 42;"):
        build(tiny_encoder, plain_data, "train.loss=sampled_softmax")
    build(tiny_encoder, plain_data, "train.loss=sampled_softmax", "train.negatives_from=uniform")


KINDS = ("view", "购买")


def with_kinds(data):
    """Every third event is a purchase."""
    sizes = [len(items) for items in data.users["item"].to_pylist()]
    kinds = pa.array([[[KINDS[n % 3 == 0]] for n in range(size)] for size in sizes], pa.list_(pa.list_(pa.string())))
    fitted = Fitted({**data.fitted.vocabularies, "kind": Vocabulary(KINDS)}, data.fitted.scales, data.fitted.vectors)
    return Data(data.catalog, fitted, data.users.append_column("event.kind", kinds))


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_count_by_their_kind(tiny_encoder, plain_data, loss):
    data = with_kinds(plain_data)
    view = "views.kind={kind: category, level: event, column: kind}"
    found = []
    for overrides in (["train.weights={view: kind, values: {购买: 1.0e+6}}"], ["model.dropout=0"]):
        config = tiny.config(tiny_encoder, view, f"train.loss={loss}", *overrides)
        histories = data.histories(config)
        model = new_model(config, data, Shards.whole(histories))
        model.text.refresh()
        model.eval()
        batch = collate(histories, train_examples(histories, 8)[:9], kind="kind")
        bought = (batch.kind == FIRST + 1).any(-1)
        assert 0 < bought.sum() < (batch.target >= FIRST).sum()
        if len(found) == 1 and loss != "bce":  # bce draws for each target, so others are drawn without the rest
            batch = dataclasses.replace(batch, target=batch.target * bought)
        found.append(float(model(batch, torch.Generator().manual_seed(0)).detach()))
    if loss == "bce":
        assert found[0] != pytest.approx(found[1], rel=1e-3)
    else:
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_weight_for_a_value_that_is_not_there(tiny_encoder, plain_data):
    config = tiny.config(
        tiny_encoder,
        "views.kind={kind: category, level: event, column: kind}",
        "train.weights={view: kind, values: {cart: 2}}",
    )
    data = with_kinds(plain_data)
    with pytest.raises(ConfigError, match=r"train.weights.values: expected .*\(view, 购买\), found 'cart'"):
        new_model(config, data, data.shards(config))


def test_a_view_may_have_the_name_of_an_attribute(tiny_encoder, plain_data):
    genres, year = "{kind: category, level: item, column: genres}", "{kind: number, level: item, column: year}"
    config = tiny.config(tiny_encoder, f"views={{id: {{kind: id}}, type: {genres}, vectors: {year}}}")
    names = {"genres": "type", "year": "vectors"}
    table = plain_data.catalog.table
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    fits = plain_data.fitted
    fitted = Fitted({"type": fits.vocabularies["genres"]}, {"vectors": fits.scales["year"]})
    data = Data(Catalog(table), fitted, plain_data.users)
    model = new_model(config, data, data.shards(config))
    histories = data.histories(config)
    model(collate(histories, train_examples(histories, 8)[:9]), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for name in names.values() for p in model.encoders[name].parameters())


@pytest.mark.parametrize(("fusion", "length"), [("gated", 0.5), ("linear", 1.0)])
def test_new_items_are_believed_less_but_not_by_the_source_formulation(tiny_encoder, plain_data, fusion, length):
    model = build(tiny_encoder, plain_data, f"model.fusion={fusion}")
    model.certainty.fill_(0.5)
    model.known[FIRST] = False
    with torch.no_grad():
        vectors = catalogue(model)[1].norm(dim=1)
    torch.testing.assert_close(vectors[FIRST : FIRST + 2], torch.tensor([length, 1.0]))
