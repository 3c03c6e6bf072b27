"""Raw files of every format, and what is read of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest

from mvrec_core.data import Source
from mvrec_core.errors import ConfigError, DataError
from pipelines import raw

NAMES = ("user_id", "item_id", "timestamp")
ROWS = [("用户1", "a,b", "1"), ("u2", "玩具 总动员", "2"), ("", 'say "喂"', "9223372036854775807")]


def write(path: Path, rows=ROWS, names=NAMES, encoding="utf-8") -> str:
    """The rows in the format and compression that the path's name tells."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith(".tsv"):
        text = "".join("\t".join(row) + "\n" for row in [names, *rows])
    else:
        lines = io.StringIO()
        csv.writer(lines).writerows([names, *rows])
        text = lines.getvalue()
    write_bytes(path, text.encode(encoding))
    return str(path)


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=codec) as stream:
        stream.write(data)


def read(file, names=NAMES, groups=None, **source) -> list[tuple]:
    """Each row: its number and the values."""
    found = raw.chunks(str(file), Source(path=str(file), **source), names, groups)
    return [row for chunk in found for row in chunk.frame.insert_column(0, chunk.rows.alias("row")).rows()]


def read_bad(file, names=NAMES, **source) -> list[tuple[int, str, str]]:
    return [bad for chunk in raw.chunks(str(file), Source(path=str(file), **source), names) for bad in chunk.bad]


def read_whole(file, **source) -> list[dict]:
    found = raw.chunks(str(file), Source(path=str(file), **source), ())
    return [json.loads(text) for chunk in found for text in chunk.whole(range(len(chunk.rows)))]


def refusal(read, *args, **kwargs) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        list(read(*args, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(rows) -> list[tuple]:
    return [(number, *row) for number, row in enumerate(rows, 1)]
