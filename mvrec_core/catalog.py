"""Where an external id or category value becomes an index; index 0 is PAD (nothing), 1 is UNKNOWN (something new)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PAD, UNKNOWN, FIRST = 0, 1, 2
FEW = 4096  # strings: more are looked up faster in one pass of Arrow, which hashes the whole vocabulary first


class Vocabulary:
    """Distinct strings; the one at position p has the index FIRST + p."""

    def __init__(self, values: Sequence[str] | pa.Array):
        self.values = pa.array(values, pa.string()) if not isinstance(values, pa.Array) else values.cast(pa.string())

    def __len__(self) -> int:
        """Indices in use, PAD and UNKNOWN included: the rows that an embedding table needs."""
        return FIRST + len(self.values)

    def index(self, values: Sequence[str | None] | pa.Array) -> np.ndarray:
        """int64 [n] of n strings: UNKNOWN for a string that is not here, PAD for null."""
        if isinstance(values, Sequence) and len(values) <= FEW:
            return np.array([PAD if v is None else self._place.get(v, UNKNOWN) for v in values], np.int64)
        strings = pa.array(values, pa.string()) if not isinstance(values, (pa.Array, pa.ChunkedArray)) else values
        position = pc.index_in(strings.cast(pa.string()), value_set=self.values)
        found = pc.fill_null(position, UNKNOWN - FIRST).to_numpy(zero_copy_only=False).astype(np.int64) + FIRST
        found[strings.is_null().to_numpy(zero_copy_only=False)] = PAD
        return found

    def value(self, index: int) -> str:
        return self.values[index - FIRST].as_py()

    @cached_property
    def _place(self) -> dict[str, int]:
        return {value: place for place, value in enumerate(self.values.to_pylist(), FIRST)}


@dataclass(frozen=True)
class Catalog:
    """The items that can be ranked, and what is known of them.

    table: a row an item in index order: item_id, display, and a column a item-level view that reads columns
    """

    table: pa.Table

    @cached_property
    def ids(self) -> Vocabulary:
        return Vocabulary(self.table["item_id"].combine_chunks())

    @cached_property
    def display(self) -> list[str | None]:
        """What people see of each item."""
        return self.table["display"].to_pylist()

    def __len__(self) -> int:
        """Items, without PAD and UNKNOWN."""
        return self.table.num_rows

    def changed(self, table: pa.Table, order: np.ndarray) -> Catalog:
        """These items and those of a table with at least the same columns, taken in an order: of its places the first
        stand for the items that are here."""
        more = table.select(self.table.column_names).cast(self.table.schema)
        return Catalog(pa.concat_tables([self.table, more]).take(pa.array(order)).combine_chunks())
