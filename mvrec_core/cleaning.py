"""Which valid events are left out. A step gives each row its reason to go, or null; the rows that stay go on.

Rows come as one frame of whole users, sorted by user_id, timestamp and then the order of the log.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import polars_hash as plh

from mvrec_core.data import Clean, Core, LastN, LeaveOneOut, Rate, Temporal
from mvrec_core.errors import ConfigError
from mvrec_core.schema import instant
from mvrec_core.sequences import TEST, TRAIN, VALID

DUPLICATE = "duplicate row"
REPEAT = "the item of the event before"
HELD_OUT = "the item is held out as new"
Split = LeaveOneOut | LastN | Temporal


def clean(frame: pl.DataFrame, steps: Clean, read: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that stay after duplicates, repeats and max_rate; and the others with a column "reason".

    read: the columns beside user_id, item_id and timestamp in which duplicates have to be equal
    """
    gone = []
    for reason in (
        _duplicates(frame, read) if steps.duplicates else None,
        _repeats() if steps.repeats else None,
        _too_fast(steps.max_rate) if steps.max_rate else None,
    ):
        if reason is not None:
            frame, out = part(frame, reason)
            gone.append(out)
    return frame, pl.concat(gone) if gone else frame.clear().with_columns(reason=pl.lit(None, pl.String))


def part(frame: pl.DataFrame, reason: pl.Expr) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows without a reason, and those with one."""
    marked = frame.with_columns(reason.alias("reason"))
    return marked.filter(pl.col("reason").is_null()).drop("reason"), marked.filter(pl.col("reason").is_not_null())


def split(frame: pl.DataFrame, by: Split) -> pl.Series:
    """int8 [rows]: TRAIN, VALID or TEST of each row, named "split"."""
    if isinstance(by, Temporal):
        valid_from, test_from = cuts(by)
        time = pl.col("timestamp")
        cut = pl.when(time >= test_from).then(TEST).when(time >= valid_from).then(VALID).otherwise(TRAIN)
        return frame.select(cut.cast(pl.Int8).alias("split")).to_series()
    size, back = _places(frame)
    held = np.where(back < by.n, TEST, np.where(back < 2 * by.n, VALID, TRAIN))
    return pl.Series("split", np.where(size > 2 * by.n, held, TRAIN).astype(np.int8))


def cuts(by: Temporal) -> tuple[int, int]:
    """valid_from and test_from in microseconds. Raises ConfigError unless the one is before the other."""
    found = (instant(by.valid_from, "data.split.valid_from"), instant(by.test_from, "data.split.test_from"))
    if found[0] >= found[1]:
        raise ConfigError(f"data.split: expected valid_from before test_from, found {by.valid_from}, {by.test_from}")
    return found


def held_out(share: float) -> pl.Expr:
    """The reason of events before test of the items that are to be new at test: `share` of all, by a hash of the id;
    needs the column split."""
    hashed = plh.col("item_id").cast(pl.String).nchash.xxhash64()  # type: ignore[attr-defined]
    new = hashed % 10_000 < round(share * 10_000)
    return pl.when(new & (pl.col("split") != TEST)).then(pl.lit(HELD_OUT))


def beyond(max_history: int) -> pl.Expr:
    """The reason of train events older than the newest `max_history` of a user; needs the column split."""
    train = pl.col("split") == TRAIN
    newer = train.cast(pl.Int64).sum().over("user_id") - train.cast(pl.Int64).cum_sum().over("user_id")
    return pl.when(train & (newer >= max_history)).then(pl.lit(f"older than the newest {max_history} train events"))


def surely_beyond(max_history: int, by: Split) -> pl.Expr:
    """As `beyond`, for some of a user's rows before they are split: true only of rows that go in any case."""
    held = 0 if isinstance(by, Temporal) else 2 * by.n
    before = pl.col("timestamp") < cuts(by)[0] if isinstance(by, Temporal) else pl.lit(True)
    newer = before.cast(pl.Int64).sum().over("user_id") - before.cast(pl.Int64).cum_sum().over("user_id")
    late = before & (newer >= max_history + held)
    return pl.when(late).then(pl.lit(f"older than the newest {max_history} train events"))


def outside_core(core: Core, users: pl.Series, items: pl.Series) -> pl.Expr:
    """The reason of events of users or items that are not in the core; `users` and `items` are the ids that are."""
    reason = pl.lit(None, pl.String)
    for column, least, inside in (("item_id", core.items, items), ("user_id", core.users, users)):
        if least > 1:
            what = f"{column} is outside the core of {core.users} events a user and {core.items} an item"
            reason = pl.when(pl.col(column).is_in(inside.implode())).then(reason).otherwise(pl.lit(what))
    return reason


def starts(users: pl.Series) -> np.ndarray:
    """int64 [users]: the place of each user's first row, of rows sorted by user_id."""
    codes = users.to_physical()
    return (codes != codes.shift()).fill_null(True).arg_true().to_numpy().astype(np.int64)


def _duplicates(frame: pl.DataFrame, read: Sequence[str]) -> pl.Expr:
    keys = ["user_id", "item_id", "timestamp", *read]
    flat = [pl.col(k).list.join("\x1f") if isinstance(frame.schema[k], pl.List) else pl.col(k) for k in keys]
    return pl.when(~pl.struct(flat).is_first_distinct()).then(pl.lit(DUPLICATE))


def _repeats() -> pl.Expr:
    same = (pl.col("item_id") == pl.col("item_id").shift()) & (pl.col("user_id") == pl.col("user_id").shift())
    return pl.when(same.fill_null(False)).then(pl.lit(REPEAT))


def _too_fast(rate: Rate) -> pl.Expr:
    span = pl.col("timestamp") - pl.col("timestamp").shift(rate.events)  # of rate.events + 1 events
    same = pl.col("user_id") == pl.col("user_id").shift(rate.events)
    fast = (same & (span < round(rate.seconds * 1_000_000))).fill_null(False)
    what = f"the user has more than {rate.events} events within {rate.seconds:g} s"
    return pl.when(fast.any().over("user_id")).then(pl.lit(what))


def _places(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows] each: how many rows the row's user has, and the row's place from their end, 0 for the last."""
    first = starts(frame["user_id"])
    sizes = np.diff(first, append=len(frame))
    return np.repeat(sizes, sizes), np.repeat(first + sizes, sizes) - 1 - np.arange(len(frame))
