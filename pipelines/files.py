"""Files and directories that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mvrec_core.errors import ResourceError


def publish(aside: Path, target: Path) -> None:
    """Renames `aside`, which must stand beside `target`; an older target steps aside first and is deleted last."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def aside_of(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to be published; one that is left over, ours or a killed run's, is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in [*target.parent.glob(f"{target.name}.old-*"), *target.parent.glob(f"{target.name}.tmp-*")]:
        if _alive(int(left.name.rpartition("-")[2])):
            continue
        if ".old-" in left.name and not target.exists():  # killed between the two renames of `publish`
            left.rename(target)
        shutil.rmtree(left, ignore_errors=True)
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_parquet(path: Path, table: pa.Table) -> None:
    """Text is dictionary-encoded; numbers are not, as most of them differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [_leaf(column.name, column.type) for column in table.schema]
    texts = [leaf for leaf, kind in leaves if pa.types.is_string(kind)]
    times = {leaf: "DELTA_BINARY_PACKED" for leaf, kind in leaves if pa.types.is_int64(kind)}
    with _written(path) as new:
        pq.write_table(
            table, new, compression="zstd", use_dictionary=texts or False, column_encoding=times or None,
            write_statistics=False,
        )  # fmt: skip


def write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """One record batch, uncompressed: to be mapped into memory and read in slices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written(path) as new, pa.OSFile(str(new), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def write_text(path: Path, text: str) -> None:
    with _written(path) as new:
        new.write_text(text, encoding="utf-8")


def link(old: Path, new: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Turns a full disk into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ResourceError(f"{path}: no space left on the disk; nothing was published") from None
        raise


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its own name when it is whole. A task that is killed and run again writes
    under the same two names."""
    new = path.with_name(f".{path.name}.tmp")
    with room(path):
        yield new
        os.replace(new, path)


def _leaf(path: str, kind: pa.DataType) -> tuple[str, pa.DataType]:
    """The values of a column, as Parquet names them, and their type."""
    return _leaf(f"{path}.list.element", kind.value_type) if pa.types.is_list(kind) else (path, kind)
