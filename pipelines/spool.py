"""The spool: the checked rows of the log, shared out over slots by user, so that any bucket can be made from it.

    raw files --(a task a few files)--> spool/part-*.arrow, each sorted by slot; what is refused goes to rejected/
    a slice of every part --> one bucket, its rows in the order of the log

It is on disk, so memory is bounded by a chunk and a bucket, never by the log. It stays beside the prepared data: an
increment adds parts, and makes anew only the buckets that it touches.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import polars_hash as plh
import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.cleaning import surely_beyond
from mvrec_core.config import Config
from mvrec_core.data import Source
from mvrec_core.schema import Columns, invalid_ids, left_out, read_ids, read_timestamps, read_value, unreadable
from mvrec_core.views import NumberView
from pipelines import files, locations, raw
from pipelines.chunk import Chunk

SLOTS = 4096  # the most buckets there can be
ROWS = 500_000  # of a part, and of a bucket where the number of buckets is chosen
TASK = 64 << 20  # bytes of small files that one task reads
OFFSETS = b"offsets"
VALUES = {
    "text": pa.string(),
    "category": pa.list_(pa.string()),
    "number": pa.float64(),
    "time": pa.int64(),
    "vector": pa.list_(pa.float32()),
}
REJECTED = pa.schema(
    [("source", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("raw", pa.string()), ("reason", pa.string())]
)


# which bucket a user is in


def choose_buckets(config: Config, rows: int) -> int:
    """The number of buckets for so many rows: the configured one, else a power of two."""
    return config.data.buckets or min(SLOTS, 1 << max(0, -(-rows // ROWS) - 1).bit_length())


def slots_of(config: Config) -> int:
    return config.data.buckets or SLOTS


def slot_of(user_ids: pl.Series, slots: int) -> np.ndarray:
    """uint16 [n]: the slot of each id, from its xxHash64 modulo the slots.

    Of SLOTS it is that number with its bits reversed: then the users of any power of two of buckets, the hash modulo
    their number, have slots that stand side by side.
    """
    hashed = pl.DataFrame({"id": user_ids}).select(plh.col("id").nchash.xxhash64())["id"].to_numpy()
    slot = (hashed % np.uint64(slots)).astype(np.uint16)
    return _reversed(np.arange(SLOTS, dtype=np.uint16), SLOTS)[slot] if slots == SLOTS else slot


def slots_in(bucket: int, buckets: int, slots: int) -> slice:
    """The slots of a bucket."""
    width = slots // buckets
    place = bucket if width == 1 else int(_reversed(np.array([bucket], np.uint16), buckets)[0])
    return slice(place * width, (place + 1) * width)


def _reversed(numbers: np.ndarray, count: int) -> np.ndarray:
    """Numbers below `count`, a power of two, with their bits in reverse order."""
    out = np.zeros_like(numbers)
    for bit in range(count.bit_length() - 1):
        out = (out << 1) | ((numbers >> bit) & 1)
    return out


# writing


@dataclass(frozen=True)
class Filled:
    """What one task read: rows by reason why they were refused, numbers that could not be read, digests of files."""

    task: int
    rows: int
    kept: int
    reasons: dict[str, int]
    unread: dict[str, int]
    files: dict[str, tuple[int, str]]  # bytes and sha256


def tasks(pieces: Sequence[raw.Piece], cores: int) -> list[list[raw.Piece]]:
    """Pieces in their order, the small ones together, but so that each core gets a few tasks."""
    sizes = [locations.size(piece.file) if piece.groups is None else TASK for piece in pieces]
    most = min(TASK, sum(sizes) // (4 * cores))
    groups: list[list[raw.Piece]] = []
    held = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += size
    return groups


def fill(config: Config, pieces: Sequence[raw.Piece], task: int, prefix: str, out: Path) -> Filled:
    """Reads the pieces of one task, which writes parts named by prefix and task. Raises DataError, ResourceError."""
    columns = Columns.of(config, "events")
    rows, reasons, unread = 0, Counter[str](), Counter[str]()
    digests: dict[str, tuple[int, str]] = {}
    spooled, refused = 0, _Refused(out / "rejected" / f"part-{prefix}-{task:05d}.parquet")
    held: list[pl.DataFrame] = []
    kept = 0

    def spill() -> None:
        nonlocal spooled
        frame = pl.concat(held, rechunk=True)  # to gather from many chunks is slow
        _write_part(out / "spool" / f"part-{prefix}-{task:05d}-{spooled:04d}.arrow", config, frame)
        held.clear()
        spooled += 1

    for piece in pieces:
        source = config.data.events[piece.source]
        if piece.groups is None or piece.groups[0] == 0:
            digests[piece.file] = locations.fingerprint(piece.file)
        for chunk in raw.chunks(piece.file, source, columns.names, piece.groups):
            frame, gone, why = _checked(config, chunk.frame, source)
            numbers = chunk.rows
            rows += len(frame) + len(chunk.bad)
            if len(chunk.bad) or len(why):
                reasons.update(refused.add(piece.file, chunk, gone.arg_true().to_list(), why.to_list()))
                frame, numbers = frame.filter(~gone), numbers.filter(~gone)
            for name, view in columns.views.items():
                if isinstance(view, NumberView):
                    unread[name] += unreadable(frame, view)
            held.append(_spooled(columns, frame, piece.number, numbers))
            kept += len(frame)
            if sum(map(len, held)) >= ROWS:
                spill()
    if held:
        spill()
    refused.close()
    return Filled(task, rows, kept, dict(reasons), dict(unread), digests)


def schema_of(config: Config) -> pa.Schema:
    """The rows of a part: number is that of the file among the event files of the run, row that within the file."""
    fixed = [("number", pa.int32()), ("row", pa.int64()), ("user_id", pa.string()), ("item_id", pa.string()),
             ("timestamp", pa.int64())]  # fmt: skip
    return pa.schema(fixed + [(f"view.{name}", VALUES[v.kind]) for name, v in config.views_at("event").items()
                              if v.kind != "time"])  # fmt: skip


def _checked(config: Config, frame: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
    """The rows with typed ids and timestamps; which of them are refused; and the reasons of those."""
    frame = read_ids(frame, ["user_id", "item_id"])
    frame, no_time = read_timestamps(frame, source.timestamp_unit)
    clean = config.data.clean
    invalid = pl.any_horizontal(pl.col("user_id", "item_id", "timestamp").is_null())
    reason = pl.coalesce(
        invalid_ids(["user_id", "item_id"]),
        pl.when(pl.col("timestamp").is_null()).then(pl.lit(no_time)),
        left_out(frame, clean),
    )
    filtered = clean.keep or clean.ranges or clean.since or clean.until
    gone = frame.select((invalid | left_out(frame, clean).is_not_null()) if filtered else invalid).to_series()
    why = frame.filter(gone).select(reason.alias("reason")).to_series()
    if clean.max_history is not None and not (clean.duplicates or clean.repeats or clean.max_rate):
        late = (
            frame.select("user_id", "timestamp", place=pl.int_range(pl.len()))
            .filter(~gone)
            .sort(["user_id", "timestamp"], maintain_order=True)
            .with_columns(reason=surely_beyond(clean.max_history, config.data.split))
            .filter(pl.col("reason").is_not_null())
        )
        places = pl.concat([gone.arg_true().cast(pl.Int64), late["place"]])
        why = pl.concat([why, late["reason"]]).gather(places.arg_sort())
        gone = gone.scatter(late["place"], True)
    return frame, gone, why


def _spooled(columns: Columns, frame: pl.DataFrame, number: int, rows: pl.Series) -> pl.DataFrame:
    """Checked rows as a part holds them."""
    views = {f"view.{name}": read_value(frame, view) for name, view in columns.views.items() if view.kind != "time"}
    fixed = [frame[name] for name in ("user_id", "item_id", "timestamp")]
    return pl.DataFrame(fixed).with_columns(number=pl.lit(number, pl.Int32), row=rows, **views)


def _write_part(path: Path, config: Config, frame: pl.DataFrame) -> None:
    slots = slots_of(config)
    slot = slot_of(frame["user_id"], slots)
    order = np.argsort(slot, kind="stable")
    offsets = np.searchsorted(slot[order], np.arange(slots + 1)).astype("<i4")
    schema = schema_of(config).with_metadata({OFFSETS: offsets.tobytes()})
    table = frame[order].select(schema.names).to_arrow().cast(schema_of(config)).combine_chunks()
    batch = table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=schema)
    files.write_arrow(path, batch.replace_schema_metadata(schema.metadata))


class _Refused:
    """A file of refused rows, opened when there is one."""

    def __init__(self, path: Path):
        self._path, self._new = path, path.with_name(f".{path.name}.tmp")
        self._writer: pq.ParquetWriter | None = None

    def add(self, file: str, chunk: Chunk, places: list[int], why: list[str]) -> Counter[str]:
        """Writes the rows at the given places and what a chunk could not hold; counts by reason."""
        rows = chunk.rows.gather(places).to_list()
        whole, why = chunk.whole(places) if places else [], list(why)
        for row, text, told in chunk.bad:
            rows.append(row)
            whole.append(json.dumps({"text": text}, ensure_ascii=False))
            why.append(told)
        table = pa.table([["events"] * len(rows), [file] * len(rows), rows, whole, why], schema=REJECTED)
        with files.room(self._path):
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(self._new, REJECTED, compression="zstd")
            self._writer.write_table(table)
        return Counter(why)

    def close(self) -> None:
        if self._writer is not None:
            with files.room(self._path):
                self._writer.close()
                self._new.replace(self._path)


# reading


def parts(root: Path) -> list[Path]:
    """The parts in the order of the log."""
    return sorted((root / "spool").glob("part-*.arrow"))


def rows_in(part: Path, buckets: int) -> np.ndarray:
    """int64 [buckets]: a part's rows of each bucket."""
    offsets, slots = _offsets(_schema(part))
    ranges = [slots_in(bucket, buckets, slots) for bucket in range(buckets)]
    return np.array([offsets[r.stop] - offsets[r.start] for r in ranges], np.int64)


def read(config: Config, found: Sequence[Path], bucket: int, buckets: int) -> pl.DataFrame:
    """The rows of a bucket in the order of the log; its ids are Enums, integers that sort as the ids do."""
    schema = schema_of(config)
    slices = []
    for path in found:
        batch = _map(path).get_batch(0)
        offsets, slots = _offsets(batch.schema)
        span = slots_in(bucket, buckets, slots)
        start, stop = int(offsets[span.start]), int(offsets[span.stop])
        if stop > start:
            slices.append(batch.slice(start, stop - start).replace_schema_metadata(None))
    # Arrow copies the slices; Polars would take the values of a list column from the whole of each part
    table = pa.Table.from_batches(slices, schema=schema).combine_chunks()
    ids = ["user_id", "item_id"]
    rest = pl.DataFrame(table.drop_columns(ids))
    return rest.with_columns(_coded(table[name]).alias(name) for name in ids).select(schema.names)


def _coded(ids: pa.ChunkedArray) -> pl.Series:
    coded = ids.combine_chunks().dictionary_encode()  # hashes each row once; what follows is for the distinct ids
    names = pl.Series(coded.dictionary, dtype=pl.String)
    return names.cast(pl.Enum(names.sort())).gather(pl.Series(coded.indices))


def _map(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _schema(path: Path) -> pa.Schema:
    return _map(path).schema


def _offsets(schema: pa.Schema) -> tuple[np.ndarray, int]:
    offsets = np.frombuffer(schema.metadata[OFFSETS], "<i4")
    return offsets, len(offsets) - 1
