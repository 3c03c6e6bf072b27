"""What the items of a catalogue can be filtered and capped by: the values of their categories, and their numbers as the
data has them.

Shapes: N catalogue rows, PAD and UNKNOWN included; F category values of all items together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mvrec_core.catalog import FIRST
from mvrec_core.config import Config
from mvrec_core.errors import RequestError, nearest

KEPT_MASKS = 64  # of N bytes each


@dataclass(frozen=True)
class OneOf:
    """Items that have one of the values `any` of a category view (None: whatever they have) and none of `none`.

    A value that no item has matches nothing and is no mistake: a shop's filter must not fail when its last item goes.
    """

    view: str
    any: frozenset[str] | None = None
    none: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Between:
    """Items whose number is in min .. max, both included, in the units of the data; one that lacks it is left out."""

    view: str
    min: float | None = None
    max: float | None = None


Condition = OneOf | Between


@dataclass(frozen=True)
class Values:
    """A category view of all items: row j has the values code[first[j] : first[j + 1]].

    codes: {value: code}      first: int64 [N + 1]      code: int32 [F]
    """

    codes: Mapping[str, int]
    first: np.ndarray
    code: np.ndarray

    @staticmethod
    def of(values: pa.ListArray) -> Values:
        """Of N rows of text lists."""
        encoded = pc.dictionary_encode(values.flatten())
        codes = {value: code for code, value in enumerate(encoded.dictionary.to_pylist())}
        size = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        first = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        return Values(codes, first, encoded.indices.to_numpy(zero_copy_only=False))

    def having(self, values: frozenset[str]) -> np.ndarray:
        """bool [N]: rows with one of these values."""
        wanted = np.zeros(len(self.codes), bool)
        wanted[[self.codes[value] for value in values if value in self.codes]] = True
        mask = np.zeros(len(self.first) - 1, bool)
        row = np.repeat(np.arange(len(mask)), np.diff(self.first))
        mask[row[wanted[self.code]]] = True
        return mask

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, M]: the values of some rows, 1 + their codes, padded with 0."""
        start, size = self.first[rows], self.first[rows + 1] - self.first[rows]
        place = np.arange(size.max(initial=1))
        inside = place < size[:, None]
        codes = np.zeros(inside.shape, np.int64)
        codes[inside] = self.code[(start[:, None] + place)[inside]] + 1
        return codes


class Attributes:
    """categories: {view: Values}; numbers: {view: float64 [N], NaN where missing}; mask: of a condition whose view has
    been checked bool [N], kept for the next request. Threads may share it."""

    def __init__(self, categories: Mapping[str, Values], numbers: Mapping[str, np.ndarray]):
        self.categories = categories
        self.numbers = numbers
        self.mask = lru_cache(KEPT_MASKS)(partial(_mask, categories, numbers))

    @staticmethod
    def of(config: Config, table: pa.Table) -> Attributes:
        """Of a catalogue's table, which holds what views read as raw values; PAD and UNKNOWN have none."""
        nothing = pa.nulls(FIRST, pa.list_(pa.string()))
        categories, numbers = {}, {}
        for name, view in config.views_at("item").items():
            if view.kind == "category":
                column = pa.chunked_array([nothing, *table[name].cast(pa.list_(pa.string())).chunks])
                categories[name] = Values.of(column.combine_chunks())
            elif view.kind == "number":
                values = table[name].cast(pa.float64()).to_numpy()
                numbers[name] = np.concatenate([np.full(FIRST, np.nan), values])
        return Attributes(categories, numbers)

    def check(self, where: Sequence[Condition], caps: Sequence[tuple[str, int]] = ()) -> None:
        """Raises RequestError, which names the field and the nearest view, for a view that items do not have."""
        for condition in where:
            kind, views = ("categories", self.categories) if isinstance(condition, OneOf) else ("ranges", self.numbers)
            if condition.view not in views:
                field = f"filter.{kind}.{condition.view}"
                what = "category" if kind == "categories" else "number"
                raise RequestError(f"{field}: not a {what} view of items; {nearest(condition.view, views)}", field)
        for view, _ in caps:
            if view not in self.categories:
                field = f"caps.{view}"
                raise RequestError(f"{field}: not a category view of items; {nearest(view, self.categories)}", field)


def _mask(categories: Mapping[str, Values], numbers: Mapping[str, np.ndarray], condition: Condition) -> Tensor:
    """bool [N]: rows that a condition, whose view has been checked, lets through."""
    if isinstance(condition, OneOf):
        values = categories[condition.view]
        mask = np.ones(len(values.first) - 1, bool) if condition.any is None else values.having(condition.any)
        return torch.from_numpy(mask & ~values.having(condition.none) if condition.none else mask)
    number = numbers[condition.view]
    low = -np.inf if condition.min is None else condition.min
    high = np.inf if condition.max is None else condition.max
    return torch.from_numpy((number >= low) & (number <= high))
