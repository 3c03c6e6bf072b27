from __future__ import annotations

import numpy as np
import pytest
import torch

from mvrec_core.errors import MVRecError
from mvrec_core.hybrid import blend, standardised
from mvrec_core.metrics import ranks


def test_candidates_have_mean_0_and_deviation_1_whatever_the_scale():
    rng = np.random.default_rng(0)
    scores, allowed = torch.from_numpy(rng.normal(3, 5, (4, 30))), torch.from_numpy(rng.random((4, 30)) < 0.7)
    z = standardised(scores, allowed)
    for row, there in zip(z, allowed, strict=True):
        assert (float(row[there].mean()), float(row[there].std(correction=0))) == pytest.approx((0, 1), abs=1e-9)
    assert torch.allclose(z, standardised(7 * scores - 100, allowed))


def test_what_is_excluded_has_no_say():
    scores, allowed = torch.tensor([[1.0, 2.0, 3.0, 1e9]]), torch.tensor([[True, True, True, False]])
    assert standardised(scores, allowed)[0, :3].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])


def test_a_model_with_one_score_for_all_has_no_say():
    flat, scores = torch.full((1, 5), 0.1), torch.randn(1, 5)
    everything = torch.ones(1, 5, dtype=torch.bool)
    z = standardised(flat, everything)
    assert z.tolist() == [[0.0] * 5]
    first = standardised(scores, everything)
    assert blend(first, z, 0.4).argsort().tolist() == scores.argsort().tolist()


def test_a_blend_is_the_weighted_sum_and_its_ends_are_the_two():
    first, second = torch.randn(2, 3, 4).double()
    assert torch.allclose(blend(first, second, 0.3), 0.7 * first + 0.3 * second)
    assert torch.equal(blend(first, second, 0.0), first) and torch.equal(blend(first, second, 1.0), second)


def test_nan_does_not_pass_the_ranking():
    scores = torch.tensor([[0.0, torch.nan, 1.0]])
    with pytest.raises(MVRecError, match="found NaN"):
        ranks(standardised(scores, torch.ones(1, 3, dtype=torch.bool)), [0])
