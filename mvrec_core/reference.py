"""What a model gives on validation users, for a service to compare its own answers with."""

from __future__ import annotations

from collections import defaultdict

import torch

from mvrec_core import ranking
from mvrec_core.config import Config
from mvrec_core.drift import Bins, Reference
from mvrec_core.explanations import view_use
from mvrec_core.index import top_k
from mvrec_core.model import MVRec
from mvrec_core.policy import Filter, eligible
from mvrec_core.sequences import stage_examples
from mvrec_core.shards import Shards

MOST_USERS = 5000  # users are stored by a hash of their ids, so the first are a sample
TIMED = {"score": False, "score_at_now": True}


@torch.no_grad()
def reference(model: MVRec, shards: Shards, config: Config) -> Reference | None:
    """Of at most MOST_USERS users with a validation event; None where there is none."""
    views, items_ND = ranking.catalogue(model)
    size, left = config.evaluate.batch_size, MOST_USERS
    scores: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, list[float]] = defaultdict(list)
    for histories in shards:
        examples = stage_examples(histories, "valid", config.model.max_len)[:left]
        left -= len(examples)
        for name, timed in TIMED.items():
            for part, users in ranking.encoded(model, histories, examples, views, items_ND, size, timed):
                seen = [histories.item[histories.events_of(u, s)] for u, s in zip(part.user, part.stop, strict=True)]
                mask_BN = eligible([Filter(one) for one in seen], len(items_ND), items_ND.device)
                scale, bias = 1 / model.tau, model.bias
                found = top_k(users.vector, items_ND, 1, mask_BN, scale, bias, users.row, users.lift)
                best = found.score[:, 0]
                scores[name] += best[best > -torch.inf].tolist()
        for start in range(0, len(examples), size):
            for use in view_use(model, histories, examples[start : start + size], views):
                for view, weight in use.weights.items():
                    weights[view].append(weight)
        if left == 0:
            break
    if not scores["score"]:
        return None
    return Reference(
        MOST_USERS - left,
        {name: Bins.of(values) for name, values in scores.items()},
        {view: Bins.of(values) for view, values in weights.items()},
    )
