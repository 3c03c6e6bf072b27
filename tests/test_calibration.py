from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrec_core.calibration import BINS, CELLS, LOWEST, PER_UNIT, CalibrationSums
from mvrec_core.errors import MVRecError


def oracle(scores, outcome):
    """Pair by pair: the cell of each, the bin of each cell by how many pairs lie below its end."""
    n = len(scores)
    cells = [min(max(int((s - LOWEST) * PER_UNIT), 0), CELLS - 1) if s > LOWEST else 0 for s in scores]
    members: dict[int, list[int]] = {}
    for pair, cell in enumerate(cells):
        upto = sum(other <= cell for other in cells)
        members.setdefault((upto - 1) * BINS // n, []).append(pair)
    chance = [1 / (1 + np.exp(-s)) for s in scores]
    bins = []
    for _, pairs in sorted(members.items()):
        bins.append((np.mean([chance[p] for p in pairs]), np.mean([outcome[p] for p in pairs]), len(pairs)))
    return bins, sum(size / n * abs(p - y) for p, y, size in bins)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-50, 50) | st.sampled_from([-3.0, 0.0, 0.5]), min_size=1, max_size=120),
    seed=st.integers(0, 99),
)
def test_equal_to_the_oracle(scores, seed):
    outcome = np.random.default_rng(seed).random(len(scores)) < 0.3
    sums = CalibrationSums.of(torch.tensor(scores, dtype=torch.float64), torch.from_numpy(outcome))
    bins, error = oracle(scores, outcome.tolist())
    assert [n for _, _, n in sums.bins()] == [n for _, _, n in bins]
    assert np.array(sums.bins()) == pytest.approx(np.array(bins), abs=1e-9)
    assert sums.error() == pytest.approx(error, abs=1e-9)


def test_bins_hold_about_the_same_number_of_pairs():
    scores = torch.from_numpy(np.random.default_rng(0).normal(-6, 1.5, 30_000))
    sizes = [n for _, _, n in CalibrationSums.of(scores, scores > 0).bins()]
    assert len(sizes) == BINS and sum(sizes) == 30_000
    assert max(sizes) < 1.15 * 30_000 / BINS and min(sizes) > 0.85 * 30_000 / BINS


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_how_much_of_a_score_is_to_be_believed(share):
    draw = torch.Generator().manual_seed(0)
    bias, above = -5.0, 6 * torch.rand(400_000, generator=draw)
    outcome = torch.rand(len(above), generator=draw) < (bias + share * above).sigmoid()
    assert CalibrationSums.of(bias + above, outcome).certainty(bias) == pytest.approx(share, abs=0.02)


def test_too_few_hits_or_more_than_foretold_leave_scores_as_they_are():
    scores = torch.full((1000,), -3.0)
    few, many = torch.arange(1000) < 20, torch.arange(1000) < 500
    assert [CalibrationSums.of(scores, outcome).certainty(-5.0) for outcome in (few, many)] == [1.0, 1.0]
    assert CalibrationSums.empty().certainty(-5.0) == 1.0


def test_a_calibrated_model_has_next_to_no_error_and_a_boaster_has_its_boast():
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.normal(-1, 1, 200_000))
    outcome = torch.from_numpy(rng.random(200_000)) < scores.sigmoid()
    assert CalibrationSums.of(scores, outcome).error() < 0.005
    boast = torch.full((10_000,), 2.0)
    right = torch.arange(10_000) < 3_000
    assert CalibrationSums.of(boast, right).error() == pytest.approx(float(torch.tensor(2.0).sigmoid()) - 0.3, abs=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole():
    rng = np.random.default_rng(2)
    scores, outcome = torch.from_numpy(rng.normal(size=1000)), torch.from_numpy(rng.random(1000) < 0.1)
    whole = CalibrationSums.of(scores, outcome)
    parts = sum((CalibrationSums.of(scores[n::7], outcome[n::7]) for n in range(7)), CalibrationSums.empty())
    assert np.array(parts.bins()) == pytest.approx(np.array(whole.bins()), abs=1e-12)


def test_no_pairs_have_no_error():
    assert (CalibrationSums.empty().bins(), CalibrationSums.empty().error()) == ([], None)


def test_nan_is_refused():
    with pytest.raises(MVRecError, match="found NaN for pair 2"):
        CalibrationSums.of(torch.tensor([0.0, 1.0, torch.nan]), torch.zeros(3, dtype=torch.bool))


def test_infinite_scores_are_certain():
    sums = CalibrationSums.of(torch.tensor([torch.inf, -torch.inf]), torch.tensor([True, False]))
    assert sums.error() == 0


# scaling


def sums_of(slope: float, shift: float) -> CalibrationSums:
    score = LOWEST + (np.arange(CELLS) + 0.5) / PER_UNIT
    pairs = np.where(abs(score) < 12, 1000.0, 0.0)
    return CalibrationSums(pairs, np.zeros(CELLS), pairs / (1 + np.exp(-(slope * score + shift))))


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.4, -3.0), (2.5, 1.5)])
def test_a_scaling_is_found_again(slope, shift):
    assert sums_of(slope, shift).scaling() == pytest.approx((slope, shift), abs=1e-3)


def test_a_shift_alone_makes_the_mean_right():
    sums = sums_of(0.5, -2.0)
    a, c = sums.scaling((1.0, 1.0))
    score = LOWEST + (np.arange(CELLS) + 0.5) / PER_UNIT
    assert a == 1.0
    assert (sums.pairs / (1 + np.exp(-(score + c)))).sum() == pytest.approx(sums.observed.sum(), rel=1e-4)


def test_nothing_to_fit_changes_nothing():
    assert CalibrationSums.empty().scaling() == (1.0, 0.0)
    assert CalibrationSums.of(torch.randn(50), torch.zeros(50, dtype=torch.bool)).scaling() == (1.0, 0.0)
