from __future__ import annotations

import numpy as np
import pytest
import torch

from mvrec_core.encoders import (
    GAPS,
    SECOND,
    CategoryEncoder,
    GapEncoder,
    IdEncoder,
    NumberEncoder,
    TimeEncoder,
    VectorEncoder,
    gap_bucket,
)
from mvrec_core.features import MISSING_TIME

DAY = 86400


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(-5, 0), (0, 0), (0.9, 0), (1, 1), (1.99, 1), (2, 2), (3, 2), (4, 3), (DAY, 17), (2**28, 29), (2**40, GAPS - 2)],
)
def test_gap_bucket(seconds, bucket):
    earlier = torch.tensor([1_500_000_000 * SECOND])
    assert gap_bucket(earlier, earlier + round(seconds * SECOND)).tolist() == [bucket]


def test_gap_bucket_is_exact_at_powers_of_two():
    later = torch.tensor([2**n * SECOND for n in range(1, 30)])
    assert gap_bucket(torch.zeros_like(later), later).tolist() == list(range(2, 31))
    assert gap_bucket(torch.zeros_like(later), later - 1).tolist() == list(range(1, 30))


def test_a_missing_time_has_a_gap_of_its_own():
    time = torch.tensor([5, MISSING_TIME])
    assert gap_bucket(time, time.flip(0)).tolist() == [GAPS - 1] * 2


def test_an_unknown_item_has_no_id_view():
    encoder = IdEncoder(5, 4)
    z, present = encoder(torch.tensor([[0, 1, 2]]))
    assert present.tolist() == [[False, False, True]] and torch.equal(z[0, 2], encoder.embedding.weight[2])


def test_a_category_is_the_mean_of_its_values():
    encoder = CategoryEncoder(5, 4)
    z, present = encoder(torch.tensor([[2, 4, 0], [0, 0, 0], [3, 0, 0], [1, 0, 0]]))
    table = encoder.embedding.weight
    torch.testing.assert_close(z, torch.stack([(table[2] + table[4]) / 2, torch.zeros(4), table[3], table[1]]))
    assert present.tolist() == [True, False, True, True]


def test_a_missing_number_is_masked_and_finite():
    z, present = NumberEncoder(4)(torch.tensor([0.5, float("nan"), 5.0, 900.0]))
    assert present.tolist() == [True, False, True, True] and bool(z.isfinite().all())
    torch.testing.assert_close(z[2], z[3])  # far outliers are one


def test_a_missing_vector_is_masked_and_finite():
    encoder = VectorEncoder(2, 4, dropout=0.5).eval()
    z, present = encoder(torch.tensor([[0.5, -1.0], [float("nan")] * 2, [5.0, 1.0], [900.0, 1.0]]))
    assert present.tolist() == [True, False, True, True] and z.shape == (4, 4)
    torch.testing.assert_close(z[0], encoder.net[1](torch.tensor([0.5, -1.0])))
    torch.testing.assert_close(z[1], encoder.net[1].bias)
    torch.testing.assert_close(z[2], z[3])  # far outliers are one


def test_time_is_gap_hour_and_weekday():
    encoder = TimeEncoder(4)
    monday = (1_500_249_600 + 3 * 3600) * SECOND  # 2017-07-17 03:00 UTC, a Monday
    z, present = encoder(torch.tensor([[monday, monday + 4 * SECOND, MISSING_TIME]]))
    day = encoder.hour.weight[3] + encoder.weekday.weight[0]
    torch.testing.assert_close(z[0, 0], encoder.gap.weight[GAPS - 1] + day)
    torch.testing.assert_close(z[0, 1], encoder.gap.weight[3] + day)
    assert present.tolist() == [[True, True, False]]


def test_time_before_1970():
    encoder = TimeEncoder(4)
    z, _ = encoder(torch.tensor([[-SECOND]]))  # 1969-12-31 23:59:59, a Wednesday
    torch.testing.assert_close(
        z[0, 0], encoder.gap.weight[GAPS - 1] + encoder.hour.weight[23] + encoder.weekday.weight[2]
    )


def test_a_gap_that_training_has_hardly_seen_is_as_the_longest_well_known_there():
    encoder = GapEncoder(4)
    counts = np.zeros(GAPS, np.int64)
    counts[[2, 7, 20, GAPS - 1]] = 20_000, 21, 20, 50_000  # 2 s, 64 s, six days, no time
    encoder.learn_from(counts)
    hundred, years, short, unknown = encoder(
        torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor([[100 * SECOND], [10**9 * SECOND], [3 * SECOND], [int(MISSING_TIME)]]),
    )
    assert torch.equal(years, hundred) and not torch.equal(short, hundred)
    assert torch.equal(unknown[0], encoder.gap.weight[GAPS - 1])
