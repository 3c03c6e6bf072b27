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
