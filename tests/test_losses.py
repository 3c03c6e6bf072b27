from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mvrec_core import losses

TAU = torch.tensor(0.2)


def unit(rows, dim=6, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


USERS, ITEMS, TARGET = unit(4), unit(9, seed=1), torch.tensor([3, 0, 8, 3])
POSITIVE = (USERS * ITEMS[TARGET]).sum(-1)


def bias(value=0.0):
    return torch.tensor(value, requires_grad=True)


def test_softmax_is_the_cross_entropy():
    by_hand = F.cross_entropy(USERS @ ITEMS.T / 0.2, TARGET)
    torch.testing.assert_close(losses.softmax(USERS, ITEMS, TARGET, TAU, bias(3.0)), by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 2.0]])
@pytest.mark.parametrize("at_once", [1 << 19, 20])  # all rows, two at a time
def test_softmax_and_its_gradients_are_those_of_autograd(monkeypatch, smoothing, weights, at_once):
    monkeypatch.setitem(losses.LOGITS, "cpu", at_once)
    weight = None if weights is None else torch.tensor(weights)
    found = []
    for ours in (True, False):
        users, items, tau = (x.clone().requires_grad_() for x in (USERS, ITEMS, TAU))
        if ours:
            loss = losses.softmax(users, items, TARGET, tau, bias(1.0), weight, smoothing)
        else:
            each = F.cross_entropy(users @ items.T / tau, TARGET, reduction="none", label_smoothing=smoothing)
            loss = each.mean() if weight is None else (each * weight).sum() / weight.sum()
        loss.backward()
        found.append((loss.detach(), users.grad, items.grad, tau.grad))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sampled_softmax_with_weights_and_smoothing(smoothing):
    weight, drawn = torch.tensor([1.0, 3.0, 0.5, 2.0]), torch.tensor([1, 2, 4])  # none of the targets
    q = torch.full((9,), 1 / 9)
    logits = torch.cat([POSITIVE[:, None] / TAU, USERS @ ITEMS[drawn].T / TAU - math.log(3 / 9)], 1)
    each = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64), reduction="none", label_smoothing=smoothing)
    found = losses.sampled_softmax(
        POSITIVE, USERS @ ITEMS[drawn].T, TARGET, drawn, q.log(), TAU, bias(), weight, smoothing
    )
    torch.testing.assert_close(found, (each * weight).sum() / weight.sum())


def gbce(calibration, drawn, weight=None, items=9):
    negative = USERS @ ITEMS[drawn].T
    return losses.gbce(POSITIVE, negative, TARGET, drawn, items, calibration, TAU, bias(-0.7), weight)


def test_gbce_without_calibration_is_bce():
    drawn = torch.tensor([5])
    by_hand = losses.bce(POSITIVE, USERS @ ITEMS[5], TAU, bias(-0.7)) / 2  # a mean over the target and one negative
    torch.testing.assert_close(gbce(0.0, drawn), by_hand)


def test_gbce_raises_the_positive_to_beta():
    drawn = torch.tensor([1, 2])
    beta = (2 / 8) * (0.75 * (1 - 8 / 2) + 8 / 2)
    positive = F.softplus(-(POSITIVE / TAU - 0.7))
    negative = F.softplus(USERS @ ITEMS[drawn].T / TAU - 0.7).sum(1)
    torch.testing.assert_close(gbce(0.75, drawn), ((beta * positive + negative) / 3).mean())
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(gbce(0.75, drawn, weight), ((beta * positive + negative) / 3)[2])


def test_gbce_leaves_out_a_negative_that_is_the_target():
    alone = F.softplus(-(POSITIVE[1] / TAU - 0.7))
    weight = torch.tensor([0.0, 1.0, 0.0, 0.0])  # of the target 0
    drawn = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(gbce(0.5, drawn, weight), alone)


def test_every_item_once_drawn_evenly_is_the_full_softmax():
    every, log_q = torch.arange(9), torch.full((9,), -math.log(9))
    sampled = losses.sampled_softmax(POSITIVE, USERS @ ITEMS.T, TARGET, every, log_q, TAU, bias())
    torch.testing.assert_close(sampled, losses.softmax(USERS, ITEMS, TARGET, TAU, bias()))


def test_many_uneven_draws_come_close_to_the_full_softmax():
    q = torch.arange(1, 10).float() / 45
    drawn = q.multinomial(100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = losses.sampled_softmax(POSITIVE, USERS @ ITEMS[drawn].T, TARGET, drawn, q.log(), TAU, bias())
    full = losses.softmax(USERS, ITEMS, TARGET, TAU, bias())
    assert abs((sampled - full).item()) < 0.02
    uncorrected = torch.cat([(POSITIVE / TAU)[:, None], USERS @ ITEMS[drawn].T / TAU], 1).logsumexp(1) - POSITIVE / TAU
    assert (uncorrected.mean() - full).item() > 1


def test_a_negative_that_is_the_target_is_left_out():
    drawn = torch.full((5,), 3)
    loss = losses.sampled_softmax(
        POSITIVE[:1], USERS[:1] @ ITEMS[drawn].T, TARGET[:1], drawn, torch.zeros(9), TAU, bias()
    )
    assert loss.item() == 0.0


def test_bce_is_that_of_logits():
    negative, b = torch.tensor([0.1, -0.4, 0.9, 0.0]), bias(-0.7)
    logit = torch.cat([POSITIVE, negative]) / TAU + b
    wanted = torch.cat([torch.ones(4), torch.zeros(4)])
    by_hand = 2 * F.binary_cross_entropy_with_logits(logit, wanted)  # a sum of two means
    torch.testing.assert_close(losses.bce(POSITIVE, negative, TAU, b), by_hand)


NORMALISER = float((USERS @ ITEMS.T / 0.2).logsumexp(1).mean())


@pytest.mark.parametrize(
    ("start", "gradient"), [(0.0, 1.0), (-NORMALISER - 3, -1.0), (-NORMALISER, 0.0), (-NORMALISER + 0.5, 0.5)]
)
def test_the_bias_goes_to_minus_the_log_of_the_normaliser(start, gradient):
    b = bias(start)
    losses.softmax(USERS, ITEMS, TARGET, TAU, b).backward()
    assert abs(float(b.grad) - gradient) < 1e-5


def test_the_bias_does_not_move_the_vectors():
    grads = []
    for start in (0.0, 50.0):
        users = USERS.clone().requires_grad_()
        losses.softmax(users, ITEMS, TARGET, TAU, bias(start)).backward()
        grads.append(users.grad)
    torch.testing.assert_close(*grads)
