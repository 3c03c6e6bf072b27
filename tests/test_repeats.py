import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from mvrec_core import checkpoint as checkpoints
from mvrec_core import losses, ranking, training
from mvrec_core.batch import collate
from mvrec_core.recommender import Recommender
from mvrec_core.repeats import Repeats
from mvrec_core.requests import Candidate, Request
from mvrec_core.sequences import live_examples
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers

draw = torch.Generator().manual_seed(0)
USERS = F.normalize(torch.randn(4, 6, generator=draw), dim=1)
ITEMS = F.normalize(torch.randn(9, 6, generator=draw), dim=1)
TARGET = torch.tensor([3, 0, 8, 5])
SEEN = torch.tensor([[1, 1, 3], [2, 7, 0], [8, 8, 8], [5, 4, 4]])  # the target itself: it was taken before, or a filler
TAU = torch.tensor(0.2)
LATEST = torch.tensor([[False, True, True], [True, True, True], [False, False, True], [True, False, True]])


def bias() -> torch.Tensor:
    return torch.tensor(0.0, requires_grad=True)


def dense(mass: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(4, 9).scatter_add(1, SEEN, mass)
    return USERS @ ITEMS.T / TAU + total.log1p()


def test_a_softmax_with_masses_is_that_of_all_logits():
    mass = torch.rand(4, 3, generator=draw, requires_grad=True)
    users, items = USERS.clone().requires_grad_(), ITEMS.clone().requires_grad_()
    loss = losses.softmax(users, items, TARGET, TAU, bias(), seen_PL=SEEN, mass_PL=mass)
    loss.backward()
    again = mass.detach().clone().requires_grad_()
    by_hand = F.cross_entropy(dense(again), TARGET)
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(mass.grad, again.grad)


def test_a_softmax_without_masses_leaves_out_what_was_seen():
    logit = (USERS @ ITEMS.T / TAU).scatter(1, SEEN, -torch.inf)
    logit = logit.scatter(1, TARGET[:, None], (USERS @ ITEMS.T / TAU).gather(1, TARGET[:, None]))
    loss = losses.softmax(USERS, ITEMS, TARGET, TAU, bias(), seen_PL=SEEN)
    torch.testing.assert_close(loss, F.cross_entropy(logit, TARGET))
    smooth = losses.softmax(USERS, ITEMS, TARGET, TAU, bias(), smoothing=0.1, seen_PL=SEEN)
    log_p = logit.log_softmax(1)
    there = logit > -torch.inf
    even = (log_p.masked_fill(~there, 0).sum(1) / there.sum(1)).mean()
    torch.testing.assert_close(smooth, 0.9 * F.cross_entropy(logit, TARGET) - 0.1 * even)


def test_sampled_with_every_item_once_it_is_the_full_softmax():
    mass = torch.rand(4, 3, generator=draw)
    every, log_q = torch.arange(9), torch.full((9,), -np.log(9.0))
    taken = (SEEN[:, :, None] == every).any(1)
    again = dense(mass).gather(1, SEEN).masked_fill(~LATEST | (TARGET[:, None] == SEEN), -torch.inf)
    more = (mass * (TARGET[:, None] == SEEN)).sum(1).log1p()
    positive = (USERS * ITEMS[TARGET]).sum(1)
    sampled = losses.sampled_softmax(
        positive, USERS @ ITEMS.T, TARGET, every, log_q, TAU, bias(), None, 0.0, taken, more, again
    )
    torch.testing.assert_close(sampled, F.cross_entropy(dense(mass), TARGET))


# in a model


@pytest.fixture(scope="module", params=["softmax", "sampled_softmax"])
def config(request, tiny_encoder):
    more = ["evaluate.exclude_seen=false", f"train.loss={request.param}", "views.graph={kind: graph, size: 8}"]
    return tiny.config(tiny_encoder, *more)


@pytest.fixture(scope="module")
def recommender(config, plain_data, tmp_path_factory) -> Recommender:
    model = checkpoints.new_model(config, plain_data, plain_data.shards(config))
    assert isinstance(model.repeats, Repeats)
    before = {name: value.clone() for name, value in model.repeats.named_parameters()}
    for _ in training.fit(model, Shards.whole(plain_data.histories(config)), config, Workers()):
        pass
    assert all(not torch.equal(value, before[name]) for name, value in model.repeats.named_parameters())
    directory = tmp_path_factory.mktemp("repeats") / "checkpoint"
    checkpoints.save(directory, model, plain_data, ranking.catalogue(model)[1], {"valid": {}})
    return Recommender.load(directory)


def test_untrained_an_item_is_lifted_by_the_log_of_its_count(config, plain_data):
    model = checkpoints.new_model(config, plain_data, plain_data.shards(config))
    model.text.refresh()
    views, items = ranking.catalogue(model)
    histories = plain_data.histories(config)
    examples = live_examples(histories, config.model.max_len)[:7]
    users = ranking.encode(model, histories, examples, views, items)
    plain = ranking.Users.plain(users.vector).scores(model, items)
    lifted = users.scores(model, items) - plain
    for row, (user, start, stop) in enumerate(zip(examples.user, examples.start, examples.stop, strict=True)):
        there = histories.item[histories.events_of(user)][start:stop]
        counts = np.bincount(there[there >= 2], minlength=len(items))
        np.testing.assert_allclose(lifted[row].detach().numpy(), np.log1p(counts), atol=1e-4)


def test_the_past_alone_counts(config, plain_data):
    model = checkpoints.new_model(config, plain_data, plain_data.shards(config))
    histories = plain_data.histories(config)
    batch = collate(histories, live_examples(histories, config.model.max_len)[:5])
    mass = model.repeats(batch, torch.zeros(*batch.item.shape, config.model.dim))
    for output in range(mass.shape[1]):
        assert (mass[:, output, output:] == 0).all()
        assert ((mass[:, output, :output] > 0) == (batch.item[:, :output] >= 2)).all()


def test_lists_scores_and_reasons_agree(recommender):
    request = Request("u010", k=12, exclude_seen=False, explain=True)
    (answer,) = recommender.recommend([request])
    candidates = [Candidate(item.item_id) for item in answer.items]
    _, scored, _ = recommender.score(Request("u010"), candidates)
    assert [one.score for one in scored] == pytest.approx([item.score for item in answer.items], abs=1e-4)
    history = {event["item_id"] for event in recommender.history("u010", 100)}
    lifted = 0
    for item in answer.items:
        why = item.explanation
        told = why.baseline + sum(event.score for event in why.events) + why.error
        assert told == pytest.approx(item.score, abs=1e-3)
        for event in why.events:
            assert (event.again > 0) == (event.item_id == item.item_id)
            assert sum(event.views.values()) + event.again == pytest.approx(event.score, abs=1e-4)
            lifted += event.again > 0
    assert lifted and history & {item.item_id for item in answer.items}


def test_a_batch_answers_as_one_request_does(recommender):
    requests = [Request(f"u{n:03d}", k=5, exclude_seen=False) for n in (3, 40, 77)]
    together = recommender.recommend(requests)
    alone = [Recommender.recommend(recommender, [request])[0] for request in requests]
    assert [[i.item_id for i in a.items] for a in together] == [[i.item_id for i in a.items] for a in alone]
