from __future__ import annotations

import numpy as np
import pytest
import torch

from mvrec_core.policy import Filter, eligible


def rows(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_padding_and_unknown_never_pass():
    assert rows(eligible([Filter(), Filter(allow=[0, 1, 3])], 5)) == [[2, 3, 4], [3]]


def test_each_request_has_its_own_filters():
    filters = [
        Filter(seen=[2, 3, 2]),
        Filter(allow=[2, 4, 5]),
        Filter(deny=np.array([5])),
        Filter(seen=torch.tensor([2]), allow=[2, 4, 5], deny=[5]),
    ]
    assert rows(eligible(filters, 6)) == [[4, 5], [2, 4, 5], [2, 3, 4], [4]]


def test_an_empty_allow_list_lets_nothing_through_and_none_lets_all():
    assert rows(eligible([Filter(allow=[]), Filter(allow=None)], 4)) == [[], [2, 3]]


def test_deny_wins_over_allow_and_unknown_seen_items_are_harmless():
    assert rows(eligible([Filter(seen=[1, 0], allow=[2, 3], deny=[3])], 4)) == [[2]]


def test_no_requests():
    assert eligible([], 4).shape == (0, 4)


@pytest.mark.parametrize("bad", [Filter(seen=[4]), Filter(deny=[-1]), Filter(allow=[9])])
def test_an_index_outside_the_catalogue_is_refused(bad):
    with pytest.raises(ValueError, match=r"indices in 0 \.\. 3"):
        eligible([bad], 4)


def test_equals_sets_on_random_filters():
    rng = np.random.default_rng(0)
    filters = [
        Filter(rng.integers(0, 30, 8), None if b % 3 else rng.integers(0, 30, 12), rng.integers(0, 30, b % 4))
        for b in range(40)
    ]
    for row, f in zip(rows(eligible(filters, 30)), filters, strict=True):
        allowed = set(range(30)) if f.allow is None else set(f.allow.tolist())
        assert row == sorted(allowed - set(f.seen.tolist()) - set(f.deny.tolist()) - {0, 1})


def test_masks_narrow_the_requests_that_hold_them():
    even, small = torch.arange(8) % 2 == 0, torch.arange(8) < 5
    filters = [Filter(masks=[even]), Filter(), Filter(deny=[4], masks=[even, small]), Filter(masks=[small])]
    assert rows(eligible(filters, 8)) == [[2, 4, 6], [2, 3, 4, 5, 6, 7], [2], [2, 3, 4]]
    assert rows(eligible([Filter(masks=[even]), Filter(seen=[2], masks=[even])], 8)) == [[2, 4, 6], [4, 6]]
    assert even.tolist() == [True, False] * 4  # masks are shared: never written to
