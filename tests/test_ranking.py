import numpy as np
import torch

from mvrec_core import ranking
from mvrec_core.recommender import Recommender
from mvrec_core.reference import reference
from mvrec_core.sequences import stage_examples

USERS = 3  # that a large catalogue leaves room for at a time, of eight in a batch


def few_at_once(monkeypatch, n_rows):
    monkeypatch.setattr(ranking, "PAIRS", USERS * n_rows + 1)


def test_users_of_a_large_catalogue_come_a_few_at_a_time(plain_config, plain_model, plain_data, monkeypatch):
    histories = plain_data.histories(plain_config)
    examples = stage_examples(histories, "valid", plain_config.model.max_len)
    views, items_ND = ranking.catalogue(plain_model)
    few_at_once(monkeypatch, len(items_ND))
    parts = list(ranking.encoded(plain_model, histories, examples, views, items_ND, 8))
    full = len(examples) // 8
    assert [len(part) for part, _ in parts][: 3 * full] == [3, 3, 2] * full
    assert np.array_equal(np.concatenate([part.user for part, _ in parts]), examples.user)
    batches = [
        ranking.encode(plain_model, histories, examples[start : start + 8], views, items_ND).vector
        for start in range(0, len(examples), 8)
    ]
    assert torch.equal(torch.cat([users.vector for _, users in parts]), torch.cat(batches))


def test_what_is_ranked_does_not_depend_on_how_many_come_at_a_time(
    plain_config, plain_model, plain_data, plain_checkpoint, monkeypatch
):
    def found():
        shards = plain_data.shards(plain_config)
        (histories,) = shards
        examples = stage_examples(histories, "valid", plain_config.model.max_len)
        pairs = ranking.pair_sums(plain_model, histories, examples, plain_config)
        ranked = ranking.rank_targets(plain_model, histories, examples, plain_config)
        lists = Recommender.load(plain_checkpoint).stored.lists("test", 5).select(["user_id", "rank", "item_id"])
        return (
            ranked.above,
            pairs.observed.sum(),
            pairs.pairs.sum(),
            reference(plain_model, shards, plain_config).users,
            lists,
        )

    whole = found()
    few_at_once(monkeypatch, plain_model.n_rows)
    parts = found()
    assert np.array_equal(parts[0], whole[0])
    assert parts[1:] == whole[1:]


def test_a_catalogue_in_chunks_is_the_catalogue(plain_model):
    views, vectors = ranking.catalogue(plain_model)
    some, parts = ranking.catalogue(plain_model, chunk=7)
    assert torch.equal(some.present, views.present)
    torch.testing.assert_close(some.z, views.z)
    torch.testing.assert_close(parts, vectors)
