"""Two checkpoints on the same test users, user by user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mvrec_core import paired
from mvrec_core.catalog import FIRST
from mvrec_core.errors import DataError
from mvrec_core.metrics import NAMES, per_user
from mvrec_core.recommender import Recommender


def compare(directory: Path, against: Path, log: Callable[[str], None] = print) -> dict[str, paired.Difference]:
    """What `differences` finds between two checkpoints, logged as a table."""
    found, users = differences(Recommender.load(directory), Recommender.load(against), directory, against)
    log(_differences(found, directory, against, users))
    return found


def differences(
    first: Recommender, second: Recommender, directory: Path, against: Path
) -> tuple[dict[str, paired.Difference], int]:
    """Of each metric the difference on the same test users, with its interval and p-value; and how many users.

    Raises DataError where users, their targets, catalogues or protocols differ.
    """
    _refuse_other("items of the catalogue", set(first.item_ids), set(second.item_ids), directory, against)
    if first.config.evaluate.exclude_seen != second.config.evaluate.exclude_seen:
        raise DataError(f"evaluate.exclude_seen differs between {directory} and {against}, so the metrics do too")
    values = []
    targets = []
    for recommender in (first, second):
        examples, ranked = recommender.stored.ranks("test")
        users = recommender.histories.user_ids.take(examples.user).to_pylist()
        items = recommender.histories.item[recommender.histories.offsets[examples.user] + examples.stop]
        names = [recommender.item_ids[item - FIRST] if item >= FIRST else None for item in items]
        targets.append(dict(zip(users, names, strict=True)))
        values.append(per_user(ranked)[np.argsort(np.array(users, dtype=object), kind="stable")])
    _refuse_other("test users", set(targets[0]), set(targets[1]), directory, against)
    for user, item in targets[0].items():
        if targets[1][user] != item:
            raise DataError(
                f"test item of user '{user}': '{item}' in {directory}, '{targets[1][user]}' in {against}, "
                "so the two were not split alike"
            )
    if not targets[0]:
        raise DataError(f"{directory}: no test users to compare")
    return paired.compare(values[0], values[1], NAMES, first.config.seed), len(values[0])


def _refuse_other(what: str, first: set[str], second: set[str], directory: Path, against: Path) -> None:
    for more, less, here, there in ((first, second, directory, against), (second, first, against, directory)):
        only = more - less
        if only:
            raise DataError(f"{what} differ: {len(only)} only in {here}, such as '{min(only)}', not in {there}")


def _differences(found: Mapping[str, paired.Difference], directory: Path, against: Path, users: int) -> str:
    lines = [f"{'':10}{'first':>10}{'second':>10}{'difference':>12}{'95% interval':>22}{'p':>10}"]
    for name, of in found.items():
        span = f"{of.low:+.4f} to {of.high:+.4f}"
        lines.append(f"{name:10}{of.first:10.4f}{of.second:10.4f}{of.difference:+12.4f}{span:>22}{of.p:10.4f}")
    lines.append(f"{users} test users; first: {directory}; second: {against}; p of each metric alone, two-sided")
    return "\n".join(lines)
