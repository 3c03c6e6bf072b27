"""Raw files in chunks: row numbers and rows that cross chunk borders."""

from __future__ import annotations

import pytest

from mvrec_core.config import EventSource
from pipelines import raw

NEEDED = {name: name for name in ("user_id", "item_id", "timestamp")}


@pytest.mark.parametrize("block", [3000, 3007, 3100, 5000])
def test_quoted_newlines_cross_block_borders(tmp_path, monkeypatch, block):
    path = tmp_path / "log.csv"
    rows = "".join(f'u{i % 9},"i\nquoted\n{i}",{i}\n' for i in range(2000))
    path.write_text("user_id,item_id,timestamp\n" + rows, encoding="utf-8")
    monkeypatch.setattr(raw, "BLOCK", block)
    chunks = list(raw.chunks(str(path), EventSource(path=str(path)), NEEDED))
    assert [row for chunk in chunks for row in chunk.rows] == list(range(1, 2001))
    assert [t for chunk in chunks for t in chunk.frame["timestamp"]] == [str(i) for i in range(2000)]


def test_rows_keep_their_numbers_among_broken_ones(tmp_path, monkeypatch):
    path = tmp_path / "log.tsv"
    lines = [f"u\ti\t{i}" if i % 7 else "broken" for i in range(1, 2001)]
    path.write_text("\n".join(["user_id\titem_id\ttimestamp", *lines]), encoding="utf-8")
    monkeypatch.setattr(raw, "BLOCK", 300)
    chunks = list(raw.chunks(str(path), EventSource(path=str(path)), NEEDED))
    assert [int(t) for c in chunks for t in c.frame["timestamp"]] == [row for c in chunks for row in c.rows]
    assert [row for c in chunks for row, _, _ in c.bad] == list(range(7, 2001, 7))
