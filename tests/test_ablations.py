"""What a view is worth, and how far two rankings agree."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from mvrec_core.ablations import rank_biased_overlap, view_conflict, views_removed
from mvrec_core.index import NOTHING
from mvrec_core.masking import hide_histories, hide_items, removable
from mvrec_core.metrics import NAMES, RankingSums

ITEM_VIEWS = ["id", "text", "genres", "year"]


def by_hand(one, other, p=0.9):
    """Equation 30 of Webber et al., as it is written."""
    agreement = [len(set(one[:d]) & set(other[:d])) / d for d in range(1, len(one) + 1)]
    return agreement[-1] * p ** len(one) + (1 - p) / p * sum(a * p**d for d, a in enumerate(agreement, 1))


@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_the_formula(seed):
    draw = np.random.default_rng(seed)
    one, other = (np.stack([draw.permutation(15)[:9] for _ in range(7)]) for _ in range(2))
    found = rank_biased_overlap(torch.tensor(one), torch.tensor(other), chunk=3)
    assert found.tolist() == pytest.approx([by_hand(list(a), list(b)) for a, b in zip(one, other, strict=True)])


def test_overlap_of_the_same_of_others_and_of_the_head():
    one = torch.arange(10)[None]
    assert rank_biased_overlap(one, one).item() == pytest.approx(1)
    assert rank_biased_overlap(one, one + 10).item() == 0
    head, tail = one.clone(), one.clone()
    head[0, [0, 1]], tail[0, [8, 9]] = torch.tensor([20, 21]), torch.tensor([20, 21])
    assert rank_biased_overlap(one, head).item() < rank_biased_overlap(one, tail).item() < 1


def test_empty_slots_are_in_common_with_nothing():
    short = torch.tensor([[3, NOTHING, NOTHING]])
    assert rank_biased_overlap(short, short).item() == pytest.approx(by_hand([3, "a", "b"], [3, "c", "d"]))


def test_hidden_views_are_nowhere(plain_recommender):
    config, histories = plain_recommender.config, plain_recommender.histories
    hidden = hide_histories(histories, config, {"rating", "gender", "time"})
    assert np.isnan(hidden.event["rating"]).all() and (hidden.user["gender"] == 0).all()
    assert len(np.unique(hidden.time)) == 1 == len(np.unique(hidden.event["time"]))
    assert hidden.item is histories.item and not np.isnan(histories.event["rating"]).all()
    views = hide_items(plain_recommender._views, config, {"text"})
    assert views.present.any(0).tolist() == [True, False, True, True]
    assert len(np.unique(hide_histories(histories, config, {"rating"}).time)) > 1


def test_metrics_of_each_view_removed_and_alone(plain_recommender):
    found = views_removed(plain_recommender, "valid")
    assert list(found["view_removed"]) == [*ITEM_VIEWS, "rating", "time", "gender"]
    assert list(found["view_alone"]) == ITEM_VIEWS
    for metrics in (*found["view_removed"].values(), *found["view_alone"].values()):
        assert list(metrics) == list(NAMES)
    whole = RankingSums.from_ranks(plain_recommender.stored.ranks("valid")[1]).means()
    assert found["view_removed"]["id"] != whole and found["view_all"] == {"users": tiny.USERS, **whole}
    assert len({m["AUC"] for m in found["view_alone"].values()}) == len(ITEM_VIEWS)


def test_of_many_users_some_evenly_from_all_are_asked(plain_recommender):
    found = views_removed(plain_recommender, "test", most=20)
    examples, ranked = plain_recommender.stored.ranks("test")
    chosen = [round(place) for place in np.linspace(0, len(examples) - 1, 20) // 1]
    assert found["view_all"] == {"users": 20, **RankingSums.from_ranks(ranked[np.array(chosen)]).means()}
    conflict = view_conflict(plain_recommender, "test", most=20)
    assert conflict.user.tolist() == examples.user[chosen].tolist() and len(conflict.score) == 20


def test_with_every_view_hidden_items_are_tied(plain_recommender):
    ranked = plain_recommender.stored.ranks("test", ITEM_VIEWS)[1]
    assert (ranked.tied == ranked.others).all()
    assert RankingSums.from_ranks(ranked).means()["AUC"] == pytest.approx(0.5)


def test_conflict_is_of_every_user_of_the_stage(plain_recommender):
    found = view_conflict(plain_recommender, "test")
    assert len(found.user) == len(found.score) == tiny.USERS
    assert ((found.score >= 0) & (found.score <= 1)).all() and len(np.unique(found.score)) > 20
    assert len(found.pairs) == 6
    assert found.score.mean() == pytest.approx(1 - np.mean(list(found.pairs.values())))
    summary = found.summary()
    assert summary["mean"] == found.score.mean() and set(summary["overlap"]) >= {"id~text", "genres~year"}
    assert summary["quartiles"] == sorted(summary["quartiles"])


def test_the_lists_of_a_view_alone_leave_out_what_was_seen(plain_recommender):
    examples, rows = plain_recommender.stored.best_rows("test", tiny.ITEMS, {"text", "genres", "year"})
    histories = plain_recommender.histories
    for user, stop, best in zip(examples.user, examples.stop, rows.tolist(), strict=True):
        seen = set(histories.item[histories.events_of(user, stop)].tolist())
        listed = [row for row in best if row != NOTHING]
        assert not seen & set(listed) and len(set(listed)) == tiny.ITEMS - len(seen)


def test_the_only_view_of_items_is_not_removable(plain_config):
    only = plain_config.model_copy(
        update={"views": {name: plain_config.views[name] for name in ("text", "rating", "time")}}
    )
    assert removable(only) == ["rating", "time"]
