"""What a version has to pass before it answers anybody; the same requests warm it up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mvrec_core.errors import CheckpointError, MVRecError, RequestError
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request

USERS = 8  # stored ones that are asked for where no requests have been recorded


def try_out(new: Recommender, recorded: Sequence[Request] = (), old: Recommender | None = None) -> None:
    """Raises CheckpointError unless every request that the old version answers has an answer, every score is a number,
    and k items come where the old version has k. Without an old one k have to come."""
    requests = list(recorded) or _samples(new)
    before = [None] * len(requests) if old is None else old.recommend(requests)
    try:
        answers = new.recommend(requests)
    except MVRecError as error:
        raise CheckpointError(f"{_called(new)} fails on sample requests: {error}") from None
    for request, answer, was in zip(requests, answers, before, strict=True):
        if isinstance(was, RequestError):  # nobody is used to an answer
            continue
        if isinstance(answer, RequestError):
            raise CheckpointError(f"{_called(new)} refuses a sample request: {answer}")
        if not all(math.isfinite(item.score) for item in answer.items):
            raise CheckpointError(f"{_called(new)} gives a sample request scores that are no numbers")
        if len(answer.items) < request.k and (was is None or len(was.items) == request.k):
            raise CheckpointError(
                f"{_called(new)} gives a sample request {len(answer.items)} items, expected {request.k}"
            )


def _samples(recommender: Recommender) -> list[Request]:
    """Somebody unknown and the first stored users, who are given what they have seen too: then k items are there."""
    k = min(10, recommender.n_items)
    users = recommender.users("", USERS)
    return [Request(k=k), *(Request(user_id, k=k, exclude_seen=False) for user_id in users)]


def _called(recommender: Recommender) -> str:
    return f"version {recommender.model_version}"
