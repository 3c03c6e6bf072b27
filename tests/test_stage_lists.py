"""The lists of the stored users."""

from __future__ import annotations

import math

import pytest
import tiny

from mvrec_core.errors import RequestError
from mvrec_core.metrics import RankingSums


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_the_lists_give_the_metrics(plain_recommender, stage, k):
    examples, ranked = plain_recommender.stored.ranks(stage)
    assert ranked.tied.sum() == 0 and len(ranked) == tiny.USERS
    wanted = RankingSums.from_ranks(ranked).means()
    histories, hits, gain = plain_recommender.histories, 0, 0.0
    rows = {
        (row["user_id"], row["item_id"]): row["rank"] for row in plain_recommender.stored.lists(stage, k).to_pylist()
    }
    for user, stop in zip(examples.user, examples.stop, strict=True):
        target = f"i{histories.item[histories.offsets[user] + stop] - 2:02d}"
        rank = rows.get((histories.user_ids[int(user)].as_py(), target))
        hits += rank is not None
        gain += 0.0 if rank is None else 1 / math.log2(rank + 1)
    assert hits / tiny.USERS == pytest.approx(wanted[f"HR@{k}"], abs=1e-9)
    assert gain / tiny.USERS == pytest.approx(wanted[f"NDCG@{k}"], abs=1e-9)


def test_live_lists_are_the_answers(plain_recommender, ask):
    table = plain_recommender.stored.lists("live", 3)
    assert table.column_names == ["user_id", "rank", "item_id", "score"] and table.num_rows == 3 * 106
    rows = [row for row in table.to_pylist() if row["user_id"] == "u003"]
    answer = ask("u003", k=3)
    assert [(row["rank"], row["item_id"]) for row in rows] == [(i.rank, i.item_id) for i in answer.items]


def test_lists_refuse_a_bad_k(plain_recommender):
    with pytest.raises(RequestError, match="k: expected 1 to 40"):
        plain_recommender.stored.lists("test", 41)
