"""Vectors of items out of raw files: each is kept once as numbers, and a digest stands for it among other cells."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl
import pyarrow as pa

from mvrec_core.data import Source
from mvrec_core.errors import DataError
from mvrec_core.schema import read_ids, read_vectors
from mvrec_core.views import VectorView
from pipelines import locations, raw


class Vectors:
    """The distinct vectors of a view, in the order in which they came."""

    def __init__(self, view: VectorView):
        self.view = view
        self.size: int | None = None
        self.parts: list[np.ndarray] = []  # float32 [., size]
        self.places: dict[str, int] = {}  # digest -> row of all parts together

    def digests(self, cells: pl.Series, file: str, rows: pl.Series) -> pl.Series:
        """Takes a chunk's vectors; the digest of each, null where there is none. rows: their numbers in the file.

        Raises DataError for one that is not as many finite numbers as the first.
        """
        vectors, problem, place = read_vectors(cells, self.view, self.size)
        if problem is not None:
            raise DataError(f"{file}: row {rows[place]}: column '{self.view.column}': {problem}")
        there = vectors.drop_nulls()
        if there.is_empty():
            return pl.repeat(None, len(cells), dtype=pl.String, eager=True).alias(cells.name)
        matrix = there.explode().to_numpy().reshape(len(there), -1)
        self.size = matrix.shape[1]
        found = [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in matrix]
        new = []
        for row, digest in enumerate(found):
            if digest not in self.places:
                self.places[digest] = len(self.places)
                new.append(row)
        self.parts.append(matrix[new])
        blank = pl.repeat(None, len(cells), dtype=pl.String, eager=True).alias(cells.name)
        return blank.scatter(vectors.is_not_null().arg_true(), found)

    def of(self, digests: pl.Series) -> pl.Series:
        """List(Float32): the vectors that the digests stand for."""
        there = digests.is_not_null().to_numpy()
        size = self.size or 0
        everything = np.concatenate([np.zeros((0, size), np.float32), *self.parts])
        chosen = everything[[self.places[digest] for digest in digests.drop_nulls()]]
        ends = np.concatenate([[0], np.cumsum(there) * size])
        lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(chosen.ravel()), mask=pa.array(~there))
        return pl.Series(pl.from_arrow(lists))


def read(name: str, view: VectorView) -> tuple[pl.DataFrame, list[str]]:
    """item_id and value of a view that has files of its own, a row an item that has a vector; and these files.

    Raises DataError for a row without an item, and for an item with two different vectors.
    """
    source = Source(path=view.paths, columns={"item_id": view.key})
    files = locations.find(source, f"views.{name}")
    vectors, frames = Vectors(view), []
    keys = {"item_id": f"views.{name}.key", view.column: f"views.{name}.column"}
    for file in files:
        raw.check_columns(file, source, ["item_id", view.column], f"views.{name}", keys)
        for chunk in raw.chunks(file, source, ["item_id", view.column]):
            for row, text, reason in chunk.bad:
                raise DataError(f"{file}: row {row}: {reason}, in {text[:120]}")
            frame = read_ids(chunk.frame, ["item_id"])
            for place in frame["item_id"].is_null().arg_true():
                raise DataError(f"{file}: row {chunk.rows[place]}: expected an item in column '{view.key}', found none")
            digests = vectors.digests(frame[view.column], file, chunk.rows)
            frames.append(frame.select("item_id", digest=digests, row=chunk.rows, file=pl.lit(file)))
    rows = (
        pl.concat(frames).drop_nulls("digest")
        if frames
        else pl.DataFrame(schema={"item_id": pl.String, "digest": pl.String})
    )
    rows = rows.unique(["item_id", "digest"], keep="first", maintain_order=True)
    twice = rows.filter(pl.col("item_id").is_duplicated()).sort("item_id", maintain_order=True).head(2)
    if len(twice):
        one, other = (f"row {row} of {file}" for file, row in twice.select("file", "row").iter_rows())
        raise DataError(f"views.{name}: expected one vector of item '{twice['item_id'][0]}', found two: {one}, {other}")
    return rows.select("item_id", value=vectors.of(rows["digest"])), files
