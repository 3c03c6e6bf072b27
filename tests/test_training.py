from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvrec_core import learner
from mvrec_core.averaging import Average
from mvrec_core.batch import collate
from mvrec_core.batches import epoch_batches
from mvrec_core.catalog import FIRST
from mvrec_core.checkpoint import new_model
from mvrec_core.errors import DataError
from mvrec_core.learner import make_optimiser
from mvrec_core.metrics import RankingSums
from mvrec_core.ranking import encode, pair_sums, rank_targets
from mvrec_core.sequences import TEST, TRAIN, VALID, Examples, stage_examples, train_examples
from mvrec_core.shards import Shards
from mvrec_core.training import calibrate, fit
from mvrec_core.workers import Workers


def windows(lengths):
    limit = np.array(lengths, np.int64)
    start = (np.arange(len(limit)) % 2) * np.minimum(limit - 2, 1).clip(0)
    return Examples(np.arange(len(limit)), start, limit - 1, np.where(start > 0, start + 1, 0), limit)


SHARED = (st.lists(st.integers(1, 30), min_size=4, max_size=60), st.integers(4, 20), st.integers(1, 4))


@given(*SHARED)
def test_every_window_comes_once_and_every_worker_takes_as_many_steps(lengths, size, workers):
    examples = windows(lengths)
    shares = [epoch_batches(examples, size, [0, 1], Workers(rank, workers)) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate([rows.mine for s in shares for rows in s]).tolist()) == list(range(len(lengths)))
    assert min(len(rows.mine) for s in shares for rows in s) >= 1  # the mean over no target is not a number


@given(*SHARED)
def test_batches_do_not_depend_on_the_number_of_workers(lengths, size, workers):
    examples = windows(lengths)
    alone, beside = (epoch_batches(examples, size, [0, 1], Workers(0, count)) for count in (1, workers))
    assert [rows.mine.tolist() for rows in alone] == [rows.all.tolist() for rows in beside]


@given(*SHARED, st.integers(1, 3))
def test_the_average_over_workers_is_the_mean_over_the_whole_batch(lengths, size, workers, parts):
    examples = windows(lengths)
    loss = np.random.default_rng(0).random(len(lengths))  # of every target of a window
    targets = examples.limit - examples.first
    ranks = (epoch_batches(examples, size, [0, 1], Workers(rank, workers)) for rank in range(workers))
    for step in zip(*ranks, strict=True):
        pieces = [(rows, part) for rows in step for part in np.array_split(rows.mine, min(parts, len(rows.mine)))]
        sums = [rows.share(examples, part) * np.average(loss[part], weights=targets[part]) for rows, part in pieces]
        assert abs(sum(sums) / workers - np.average(loss[step[0].all], weights=targets[step[0].all])) < 1e-9


def test_another_epoch_has_another_order():
    examples = windows([5] * 20)
    first, again, second = (epoch_batches(examples, 4, [0, epoch], Workers()) for epoch in (1, 1, 2))
    assert [rows.mine.tolist() for rows in first] == [rows.mine.tolist() for rows in again]
    assert [rows.mine.tolist() for rows in first] != [rows.mine.tolist() for rows in second]


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize(("size", "workers"), [(1, 1), (32, 1), (101, 2), (7, 3), (500, 4)])
def test_all_101_users_are_ranked_whatever_the_batches(plain_model, plain_data, stage, size, workers):
    config = plain_model.config
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batch_size": size})})
    histories = plain_data.histories(config)
    examples = stage_examples(histories, stage, config.model.max_len)
    sums = RankingSums()
    for rank in range(workers):
        sums += RankingSums.from_ranks(rank_targets(plain_model, histories, examples[rank::workers], config))
    whole = RankingSums.from_ranks(rank_targets(plain_model, histories, examples, plain_model.config))
    assert sums.users == whole.users == tiny.USERS
    np.testing.assert_allclose(sums.sums, whole.sums, rtol=1e-9)


def test_a_target_of_no_known_item_is_a_miss(plain_model, plain_data):
    config, histories = plain_model.config, plain_data.histories(plain_model.config)
    examples = stage_examples(histories, "test", 8)
    item = histories.item.copy()
    item[histories.offsets[examples.user[0]] + examples.stop[0]] = 1
    ranked = rank_targets(plain_model, dataclasses.replace(histories, item=item), examples, config)
    assert (len(ranked), RankingSums.from_ranks(ranked).unrankable) == (tiny.USERS, 1)


def trained(encoder, data, *overrides):
    config = tiny.config(encoder, *overrides)
    histories = data.histories(config)
    model = new_model(config, data, Shards.whole(histories))
    return model, list(fit(model, Shards.whole(histories), config, Workers()))


@pytest.mark.parametrize("tune", ["frozen", "full"])
def test_the_same_seed_gives_the_same_bits(tiny_encoder, plain_data, tune):
    (one, first), (two, second) = (trained(tiny_encoder, plain_data, f"model.text.tune={tune}") for _ in range(2))
    assert len(first) == 2 and [e.loss for e in first] == [e.loss for e in second]
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_it_trains_in_bf16(tiny_encoder, plain_data, tune):
    _, epochs = trained(tiny_encoder, plain_data, "train.precision=bf16", f"model.text.tune={tune}")
    assert epochs[1].loss < epochs[0].loss


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tiny_encoder, plain_data):
    overrides = ["model.dropout=0", "model.view_dropout=0", "train.epochs=1"]
    whole, parts = (trained(tiny_encoder, plain_data, f"train.accumulate={n}", *overrides)[1][0] for n in (1, 3))
    assert abs(whole.loss - parts.loss) < 1e-3 and whole.targets == parts.targets


@pytest.mark.parametrize(("wanted", "parts"), [("batch", 1), ("batch", 2), ("popularity", 1)])
def test_negatives_of_a_batch_are_targets_of_all_workers(tiny_encoder, plain_data, monkeypatch, wanted, parts):
    """Each of two workers, and each part of what it reads, could draw any target of the batch."""
    overrides = [f"train.negatives_from={wanted}", f"train.accumulate={parts}", "train.epochs=1"]
    read: dict[int, list[list[int]]] = {}

    class Reading(torch.nn.Module):
        def __init__(self, model, rank):
            super().__init__()
            self.model, self.targets = model, read.setdefault(rank, [])

        def forward(self, batch, *others):
            own = batch.target[batch.target >= FIRST]
            self.targets.append([own.tolist(), batch.others[batch.others >= FIRST].tolist()])
            return self.model(batch, *others)

    for rank in range(2):
        config = tiny.config(tiny_encoder, "train.loss=sampled_softmax", *overrides)
        shards = plain_data.shards(config)
        workers = Workers(rank, 2, wrap=lambda model, rank=rank: Reading(model, rank))
        assert list(fit(new_model(config, plain_data, shards), shards, config, workers))
    if wanted != "batch":
        assert not any(others for calls in read.values() for _, others in calls)
        return
    for start in range(0, len(read[0]), parts):
        calls = [call for rank in read.values() for call in rank[start : start + parts]]
        everything = sorted(target for own, _ in calls for target in own)
        assert all(sorted(own + others) == everything for own, others in calls)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce", "gbce"])
def test_empty_windows_change_nothing(tiny_encoder, plain_data, loss):
    config = tiny.config(tiny_encoder, f"train.loss={loss}", "model.dropout=0", "model.view_dropout=0")
    (histories,) = plain_data.shards(config)
    examples = train_examples(histories, config.model.max_len)[:13]
    model = new_model(config, plain_data, plain_data.shards(config))
    model.refresh_texts()
    found = []
    for count in (13, 16):
        torch.manual_seed(0)
        batch = collate(histories, examples.padded(count))
        assert len(batch.item) == count
        value = model(batch, torch.Generator().manual_seed(0))
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce", "gbce"])
def test_training_learns_what_comes_next(tiny_encoder, plain_data, loss):
    _, epochs = trained(tiny_encoder, plain_data, f"train.loss={loss}", "train.epochs=8", "views={id: {kind: id}}")
    first, last = epochs[0].valid.means()["NDCG@10"], epochs[-1].valid.means()["NDCG@10"]
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert last > max(0.5, first)  # chance is 0.12


def test_an_epoch_says_what_it_did(tiny_encoder, plain_data):
    model, epochs = trained(tiny_encoder, plain_data, "train.epochs=3", "train.validate_every=2")
    told = [(e.number, e.valid is None, e.last) for e in epochs]
    assert told == [(1, True, False), (2, False, False), (3, False, True)]
    histories = plain_data.histories(model.config)
    assert {e.targets for e in epochs} == {int(((histories.split == 0) & (histories.item > 1)).sum())}
    assert epochs[1].best and epochs[1].valid.users == tiny.USERS


def test_a_refit_learns_the_validation_events_too_and_looks_at_none(tiny_encoder, plain_data):
    config = tiny.config(tiny_encoder, "train.epochs=9")
    histories = plain_data.histories(config)
    model = new_model(config, plain_data, Shards.whole(histories), before=TEST)
    epochs = list(fit(model, Shards.whole(histories), config, Workers(), refit=2))
    assert [(e.number, e.of, e.refit, e.valid, e.best, e.last) for e in epochs] == [
        (1, 2, True, None, False, False),
        (2, 2, True, None, False, True),
    ]
    known = histories.item > 1
    assert epochs[0].targets == int(((histories.split < TEST) & known).sum())
    assert epochs[0].targets == int(((histories.split == TRAIN) & known).sum()) + tiny.USERS
    assert int((histories.split == VALID).sum()) == tiny.USERS


def test_a_change_of_test_events_changes_nothing_of_a_refit(tiny_encoder, plain_data):
    config = tiny.config(tiny_encoder)
    weights = []
    for shift in (0, 1):
        histories = plain_data.histories(config)
        item = np.where(histories.split == TEST, (histories.item + shift) % 40 + 2, histories.item)
        changed = dataclasses.replace(histories, item=item)
        model = new_model(config, plain_data, Shards.whole(changed), before=TEST)
        list(fit(model, Shards.whole(changed), config, Workers(), refit=1))
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_average_of_the_weights_is_that_of_its_definition():
    layer = torch.nn.Linear(2, 1, bias=False)
    average = Average(layer, decay=0.5)
    expected, trail = layer.weight.detach().clone(), []
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight += step
        keep = min(0.5, step / (step + 10))
        expected = keep * expected + (1 - keep) * layer.weight.detach()
        average.update()
        trail.append(keep)
    assert trail[0] < 0.1 and trail[-1] == 0.5
    now = layer.weight.detach().clone()
    average.swap()
    torch.testing.assert_close(layer.weight.detach(), expected)
    average.swap()
    assert torch.equal(layer.weight.detach(), now)


def test_training_stops_when_validation_does_not_improve(tiny_encoder, plain_data):
    _, epochs = trained(tiny_encoder, plain_data, "train.lr=1e-30", "train.epochs=9", "train.patience=2")
    assert [e.best for e in epochs] == [True, False, False] and epochs[-1].last


def test_more_workers_than_windows(plain_model, plain_data):
    histories = plain_data.histories(plain_model.config)
    n = len(train_examples(histories, plain_model.config.model.max_len))
    with pytest.raises(DataError, match=f"{n + 1} workers need .* found {n} windows and train.batch_size 16"):
        next(fit(plain_model, Shards.whole(histories), plain_model.config, Workers(0, n + 1)))


def test_the_text_encoder_learns_at_its_own_rate(tiny_encoder, plain_data):
    config = tiny.config(tiny_encoder, "model.text.tune=full", "model.text.lr=1e-5")
    model = new_model(config, plain_data, plain_data.shards(config))
    groups = make_optimiser(model, config).param_groups
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    text = {id(p) for p in model.text.parameters()}
    assert {rate[p] for p in text} == {(1e-5, 0.01), (1e-5, 0.0)}
    assert rate[id(model.bias)] == rate[id(model.log_tau)] == (0.1, 0.0)
    assert rate[id(model.encoders["id"].embedding.weight)] == (0.01, 0.01)
    assert len(rate) == len(list(model.parameters()))


def test_the_update_of_a_large_model_in_one_kernel_is_the_same_but_for_last_bits(plain_model, plain_data, monkeypatch):
    ends = []
    for least in (learner.FUSED_FROM, 0):
        monkeypatch.setattr(learner, "FUSED_FROM", least)
        model = copy.deepcopy(plain_model)
        optimiser = make_optimiser(model, model.config)
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimiser.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
        assert optimiser.param_groups[0]["fused"] == (least == 0)
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-5)


def test_encode_gives_the_vector_after_the_last_step(plain_model, plain_data):
    from mvrec_core.batch import collate
    from mvrec_core.ranking import catalogue

    histories = plain_data.histories(plain_model.config)
    examples = stage_examples(histories, "test", 8)[:12]
    views, items = catalogue(plain_model)
    batch = collate(histories, examples)
    with torch.no_grad():
        every = plain_model.user_vectors(batch, views, batch.item)
    got = encode(plain_model, histories, examples, views, items).vector
    for row, stop in enumerate((examples.stop - examples.start).tolist()):
        torch.testing.assert_close(got[row], every[row, stop], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def epochs(plain_config, plain_data):
    histories = plain_data.histories(plain_config)
    model = new_model(plain_config, plain_data, Shards.whole(histories))
    return list(fit(model, Shards.whole(histories), plain_config, Workers())), histories


def test_an_epoch_tells_its_figures(epochs, plain_config):
    (first, second), histories = epochs
    windows = len(train_examples(histories, plain_config.model.max_len))
    assert first.step >= windows // plain_config.train.batch_size  # cut at random places there are more of them
    assert second.step > first.step
    assert 0 < second.lr < first.lr <= plain_config.train.lr  # it falls to the end
    assert first.throughput > first.targets / first.seconds
    assert 0 < first.padding < 1 and first.gradient_norm > 0


def test_view_weights_of_an_epoch(epochs, plain_config):
    (first, second), _ = epochs
    assert list(first.view_weights) == ["id", "text", "genres", "year", "rating", "time"]
    for epoch in (first, second):
        assert sum(epoch.view_weights.values()) == pytest.approx(1, abs=1e-5)
    assert first.view_weights != second.view_weights


def test_calibrated_scores_are_as_often_true_as_they_say_and_keep_their_order(plain_data, tiny_encoder):
    model, _ = trained(tiny_encoder, plain_data, "train.epochs=4")
    config, shards = model.config, plain_data.shards(model.config)
    histories = plain_data.histories(config)
    examples = stage_examples(histories, "valid", config.model.max_len)
    before = rank_targets(model, histories, examples, config)
    scaling = calibrate(model, shards, config, Workers())
    assert scaling.a > 0 and (scaling.a, scaling.c) != (1.0, 0.0)
    sums = pair_sums(model, histories, examples, config)
    assert sums.predicted.sum() == pytest.approx(sums.observed.sum(), rel=0.01)
    after = rank_targets(model, histories, examples, config)
    np.testing.assert_array_equal(before.expected, after.expected)
    again = calibrate(model, shards, config, Workers())
    assert (again.a, again.c) == pytest.approx((1.0, 0.0), abs=0.02)


def test_what_items_are_read_as_new_for_is_undone_and_new_items_are_believed_less(
    plain_data, tiny_encoder, monkeypatch
):
    monkeypatch.setattr("mvrec_core.calibration.LEAST_HITS", 1)
    model, _ = trained(tiny_encoder, plain_data, "train.epochs=4", "views.graph={kind: graph, size: 8}")
    config, shards = model.config, plain_data.shards(model.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaling = calibrate(model, shards, config, Workers())
    assert 0 <= scaling.certainty <= 1 and float(model.certainty) == pytest.approx(scaling.certainty)
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    }
    assert changed <= {"bias", "log_tau", "certainty"}
