from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mvrec_core.fusion import GatedFusion, LinearFusion

# the worked example of the source: five steps of four views, "viewed product 1, bought 2, viewed 3, bought 4"
STEPS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ALL = torch.ones(4, dtype=torch.bool)


def linear(A):
    fusion = LinearFusion(views=4, dim=5)
    with torch.no_grad():
        fusion.A.copy_(A.expand(4, 5, 5))
        return fusion(STEPS.T, ALL)


def test_the_worked_example_with_equal_weights():
    torch.testing.assert_close(linear(torch.zeros(5, 5)), torch.tensor([2 / 5, 2 / 5, 1 / 5, 1 / 5]))


def test_the_worked_example_with_the_identity():
    two, one = 2 * math.e / (2 * math.e + 3), math.e / (math.e + 4)
    torch.testing.assert_close(linear(torch.eye(5)), torch.tensor([two, two, one, one]))


def test_the_score_of_the_worked_example_is_a_cosine():
    two, one = 2 * math.e / (2 * math.e + 3), math.e / (math.e + 4)
    by_hand = (0.8 * two + 0.4 * one) / (math.sqrt(0.4) * math.sqrt(2 * two**2 + 2 * one**2))
    assert round(by_hand, 6) == 0.995297
    cosine = F.cosine_similarity(linear(torch.zeros(5, 5)), linear(torch.eye(5)), dim=0)
    assert abs(float(cosine) - by_hand) < 1e-6


def test_linear_starts_at_the_identity_and_an_absent_view_is_zero():
    fusion = LinearFusion(views=4, dim=5)
    with torch.no_grad():
        v = fusion(STEPS.T, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(v, linear(torch.eye(5)) * torch.tensor([1.0, 0, 1, 0]))


def gated(views=3, dim=4):
    torch.manual_seed(0)
    fusion = GatedFusion(views, dim)
    torch.nn.init.normal_(fusion.A)
    return fusion


def test_gated_weights_sum_to_one_over_the_present_views():
    present = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    h, weight, _ = gated()(torch.randn(50, 3, 4), present)
    torch.testing.assert_close(weight.sum(-1), present.any(-1).float())
    assert (weight[~present] == 0).all() and (weight[present] > 0).all()
    assert (~present.any(-1)).sum() > 0 and (h[~present.any(-1)] == 0).all()


def test_gated_weights_are_the_softmax_of_A_z():
    fusion, z = gated(), torch.randn(3, 4)
    h, weight, _ = fusion(z, torch.tensor([True, False, True]))
    first, third = (math.exp((fusion.A[i] @ z[i]).item()) for i in (0, 2))
    torch.testing.assert_close(weight, torch.tensor([first, 0, third]) / (first + third))
    torch.testing.assert_close(h, weight[0] * z[0] + weight[2] * z[2])


def test_an_absent_view_says_nothing_even_if_it_is_huge():
    fusion, z, present = gated(), torch.randn(3, 4), torch.tensor([True, False, True])
    other = z.clone()
    other[1] = 1e6
    torch.testing.assert_close(fusion(z, present)[0], fusion(other, present)[0])


def test_views_picks_its_own_A():
    fusion, z = gated(), torch.randn(2, 4)
    small = GatedFusion(2, 4)
    small.A.data = fusion.A.data[1:].clone()
    torch.testing.assert_close(fusion(z, ALL[:2], slice(1, 3))[1], small(z, ALL[:2])[1])


def test_views_fused_in_two_goes_are_as_fused_in_one():
    fusion, z = gated(views=5), torch.randn(20, 5, 4)
    present = torch.rand(20, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    assert (~present[:, :3].any(-1)).any() and (~present[:, 3:].any(-1)).any()
    whole, weight, _ = fusion(z, present)
    first, among, mass = fusion(z[:, :3], present[:, :3], slice(3))
    both, shares, _ = fusion(z[:, 3:], present[:, 3:], slice(3, None), before=(first, mass))
    torch.testing.assert_close(both, whole)
    torch.testing.assert_close(torch.cat([shares[:, :1] * among, shares[:, 1:]], -1), weight)
