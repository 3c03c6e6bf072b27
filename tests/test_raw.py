"""Raw files: every row of every format comes back, exact and with its number."""

from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import NAMES, ROWS, numbered, read, read_bad, read_whole, refusal, write

from mvrec_core.data import Source
from pipelines import decoded, locations, parquet_rows, raw

# formats


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_every_text_format_plain_and_compressed(tmp_path, form, ending):
    file = write(tmp_path / f"log.{form}{ending}")
    assert read(file) == numbered(ROWS)
    assert read_bad(file) == []
    assert read_whole(file) == [dict(zip(NAMES, row, strict=True)) for row in ROWS]
    assert read(file, ("timestamp", "user_id")) == [(n, t, u) for n, u, _, t in numbered(ROWS)]


def test_format_and_columns_come_from_the_source(tmp_path):
    (tmp_path / "part-0.gz").write_bytes(gzip.compress("谁\twhat\n甲\t9007199254740993\n".encode()))
    columns = {"user_id": "谁", "item_id": "what", "timestamp": None}
    source = {"format": "tsv", "columns": columns, "constants": {"kind": "买", "rating": 1.5, "item_id": 7}}
    assert read(tmp_path / "part-0.gz", ("user_id", "item_id", "timestamp", "kind", "rating"), **source) == [
        (1, "甲", "7", None, "买", "1.5")
    ]
    assert read_whole(tmp_path / "part-0.gz", **source) == [{"谁": "甲", "what": "9007199254740993"}]


def test_lines_in_any_manner(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeff\r\nu,"t\r\n1"\r\n\r\n甲,"x\n\ny"\r\n\n"",""""\n,\n末,'.encode())
    names = {"user_id": "u", "item_id": "t\r\n1"}
    assert read(tmp_path / "a.csv", names, columns=names) == numbered(
        [("甲", "x\n\ny"), ("", '"'), ("", ""), ("末", "")]
    )
    (tmp_path / "b.jsonl").write_bytes('\ufeff\n{"u": "甲"}\r\n \r\n  {"u": "\\u4e59\\n"}\r\r{"u": null}'.encode())
    assert read(tmp_path / "b.jsonl", ["u"]) == [(1, "甲"), (2, "乙\n"), (3, None)]
    (tmp_path / "c.tsv").write_bytes(b'u\tv\n"a\tb"\n')
    assert read(tmp_path / "c.tsv", ["u", "v"]) == [(1, '"a', 'b"')]


@pytest.mark.parametrize(
    "text", ["user_id,item_id,timestamp", "user_id,item_id,timestamp\n", "\nuser_id,item_id,timestamp\n\n"]
)
def test_a_header_without_rows(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    raw.check_columns(str(tmp_path / "log.csv"), Source(path=""), NAMES, "data.events")
    assert read(tmp_path / "log.csv") == [] == raw.take(str(tmp_path / "log.csv"), Source(path=""), [])


def test_columns_with_one_name(tmp_path):
    (tmp_path / "log.csv").write_text("a,b,a,\n1,2,3,4\n")
    assert read(tmp_path / "log.csv", ["b"]) == [(1, "2")]
    assert read_whole(tmp_path / "log.csv") == [{"a": "1", "b": "2", "a (3)": "3", "": "4"}]
    told = refusal(raw.check_columns, str(tmp_path / "log.csv"), Source(path=""), ["a"], "data.events")
    assert "expected one column 'a' (data.events.columns.a), found 2" in told


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.parquet"])
def test_a_column_that_is_not_there(tmp_path, name):
    file = write(tmp_path / name)
    if name == "log.parquet":
        pq.write_table(pa.table({column: ["x"] for column in NAMES}), file)
    raw.check_columns(
        file, Source(path=file, columns={"kind": None}, constants={"rating": 1}), [*NAMES, "kind", "rating"], "k"
    )
    told = refusal(raw.check_columns, file, Source(path=file, columns={"user_id": "user"}), NAMES, "data.events")
    assert told == f"{file}: expected a column 'user' (data.events.columns.user_id); did you mean 'user_id'?"


@pytest.mark.parametrize("block", [3000, 3007, 3100, 5000])
def test_quoted_newlines_cross_block_borders(tmp_path, monkeypatch, block):
    rows = [(f"u{i % 9}", f"i\nquoted\n{i}", str(i)) for i in range(2000)]
    monkeypatch.setattr(decoded, "BLOCK", block)
    assert read(write(tmp_path / "log.csv", rows)) == numbered(rows)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_rows_keep_their_numbers_among_broken_ones(tmp_path, monkeypatch, form):
    file = write(tmp_path / f"log.{form}", [("u", "i", str(i)) for i in range(1, 2001)])
    lines = Path(file).read_text().splitlines()
    header = 0 if form == "jsonl" else 1
    lines[header:] = [line if i % 7 else "坏" for i, line in enumerate(lines[header:], 1)]
    Path(file).write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(decoded, "BLOCK", 300)
    assert read(file) == [(i, "u", "i", str(i)) for i in range(1, 2001) if i % 7]
    reason = "not a JSON object" if form == "jsonl" else "expected 3 columns, found 1"
    assert read_bad(file) == [(i, "坏", reason) for i in range(7, 2001, 7)]
    assert raw.take(file, Source(path=file), [6, 8, 1999]) == [
        json.dumps(
            {"user_id": "u", "item_id": "i", "timestamp": str(i)}, separators=None if form == "jsonl" else (",", ":")
        )
        for i in (6, 8, 1999)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text('a,"\t{}:é中\r\n 1', max_size=12), max_size=12),
    st.sampled_from(["csv", "tsv", "jsonl"]),
    st.sampled_from([40, 1 << 20]),
)
def test_every_line_is_a_row_or_a_bad_row(tmp_path_factory, lines, form, block):
    lines = [line.replace('"', "").replace("\r", "").replace("\n", "") if form != "jsonl" else line for line in lines]
    text = "\n".join(lines)
    file = tmp_path_factory.mktemp("log") / f"log.{form}"
    file.write_bytes(("" if form == "jsonl" else "a,b\n" if form == "csv" else "a\tb\n").encode() + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "BLOCK", block)
        numbers = [row[0] for row in read(file, ["a"])] + [row for row, _, _ in read_bad(file, ["a"])]
    blank = (lambda line: not line.strip(" \t")) if form == "jsonl" else (lambda line: not line)
    there = sum(not blank(line) for line in text.replace("\r", "\n").split("\n"))
    assert sorted(numbers) == list(range(1, there + 1))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(*[st.text("a,\"'\n\r中é1\t", max_size=5)] * 3).filter(any), min_size=1, max_size=20),
    st.integers(1, 5),
    st.sampled_from(["csv", "jsonl", "csv.gz"]),
)
def test_rows_cut_into_files_are_the_same_rows(tmp_path_factory, rows, parts, form):
    folder = tmp_path_factory.mktemp("logs")
    size = -(-len(rows) // parts)
    for part in range(parts):
        write(folder / f"part-{part}.{form}", rows[part * size : (part + 1) * size])
    files = locations.find(Source(path=str(folder)), "data.events")
    assert [row[1:] for file in files for row in read(file)] == rows
    assert read(write(folder / f"whole.{form}", rows)) == numbered(rows)


# encodings and damage


@pytest.mark.parametrize("name", ["log.csv", "log.tsv.gz", "log.jsonl.zst"])
@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-8-sig"])
def test_encodings(tmp_path, name, encoding):
    rows = [("中文", "甲", "1"), ("文", "", "2")]
    assert read(write(tmp_path / name, rows, encoding=encoding), encoding=encoding) == numbered(rows)


def test_a_file_of_another_encoding(tmp_path):
    hint = "(set encoding, e.g. encoding: gb18030), found byte"
    for name in ("log.csv", "log.tsv.gz", "log.jsonl"):
        file = write(tmp_path / name, [("a", "b", "1"), ("中", "文", "2")], encoding="gb18030")
        line = 2 if name == "log.jsonl" else 3
        assert refusal(read, file) == f"{file}: line {line}: expected UTF-8 {hint} 0xd6"
        assert f"line {line}: expected ASCII {hint} 0xd6" in refusal(read, file, encoding="ascii")
    assert "unknown encoding 'gbk18030'; expected a name such as utf-8" in refusal(read, file, encoding="gbk18030")
    assert "unknown encoding 'hex'" in refusal(read, file, encoding="hex")


def test_a_wrong_byte_far_down(tmp_path):
    good = "".join(f"u{i},甲,{i}\n" for i in range(150_000))
    (tmp_path / "log.csv").write_bytes(f"user_id,item_id,timestamp\n{good}u,caf".encode() + b"\xe9,1\n")
    assert "log.csv: line 150002: expected UTF-8" in refusal(read, tmp_path / "log.csv")


def test_a_process_that_drops_a_reader_of_another_encoding_ends(tmp_path):
    file = write(tmp_path / "log.csv", [("甲", "乙", "1")] * 100_000, encoding="gb18030")
    code = (
        "import sys; from mvrec_core.data import Source; from pipelines import decoded, raw\n"
        "decoded.BLOCK = 1 << 14\n"
        "for _ in range(20): print(len(next(raw.chunks(sys.argv[1], Source(path='', encoding='gb18030'), ())).rows))"
    )
    root = Path(raw.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, file], cwd=root, capture_output=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 20


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv.zst", "log.jsonl.gz", "log.parquet"])
def test_damaged_files(tmp_path, name):
    rows = [(hashlib.md5(str(i).encode()).hexdigest(), "i", str(i)) for i in range(20_000)]
    file = Path(write(tmp_path / name, rows))
    if name == "log.parquet":
        pq.write_table(pa.table({"user_id": [row[0] for row in rows]}), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-2000])
    assert refusal(read, file).startswith(f"{file}: cannot be read: ")
    file.write_bytes(b"\x00" * 8 + whole[8:-8] + b"\x00" * 8)
    assert refusal(read, file).startswith(f"{file}: cannot be read: ")


def test_a_quote_left_open(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "BLOCK", 1 << 20)
    (tmp_path / "log.csv").write_text('user_id,item_id,timestamp\nu,"a,1\n' + "u,b,2\n" * 400_000)
    assert "a row is longer than 1 MB; is a quote left open?" in refusal(read, tmp_path / "log.csv")


def test_a_format_that_cannot_be_told(tmp_path):
    assert "log.txt: its format cannot be told from '.txt'" in refusal(read, tmp_path / "log.txt")
    assert "expected Parquet as it is" in refusal(read, tmp_path / "log.parquet.gz")
    assert "cannot be read" in refusal(read, tmp_path / "gone.csv")


# JSONL


def test_json_values_as_they_are_written(tmp_path):
    lines = [
        '{"user_id": 9007199254740993, "item_id": "甲", "timestamp": 1.50, "tags": ["x", null, "中"], "more": {}}',
        '{"user_id": 18446744073709551616, "item_id": "\\u4e59", "timestamp": 1e3, "tags": []}',
        '{"timestamp": -0.10, "item_id": null, "user_id": 7, "more": "x", "tags": null}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = [
        (1, "9007199254740993", "甲", "1.50", ["x", None, "中"]),
        (2, "18446744073709551616", "乙", "1e3", []),
        (3, "7", None, "-0.10", None),
    ]
    assert read(tmp_path / "a.jsonl", [*NAMES, "tags"]) == expected
    assert raw.take(str(tmp_path / "a.jsonl"), Source(path=""), [1, 3]) == [lines[0], lines[2]]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, "{}", '{"user_id": "x", "tags": true}', ""]), encoding="utf-8")
    assert read(tmp_path / "b.jsonl", [*NAMES, "tags"]) == [
        *expected, (4, None, None, None, None), (5, "x", None, None, ["true"])
    ]  # fmt: skip


def test_json_that_no_row_can_come_from(tmp_path):
    good = '{"user_id": 1, "item_id": "a", "timestamp": 1}'
    bad = ["{oops}", "[1]", "1", f"{good} {good}", '{"user_id": {"a": 1}}', '{"item_id": [1]}', '{"timestamp": true}']
    bad += ['{"user_id": "\\ud800"}', '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join([good, *bad, good]))
    reasons = (
        ["not a JSON object"] * 4 + [f"{name} is not text or a number" for name in NAMES] + ["not a JSON object"] * 2
    )
    assert read_bad(file) == [(n, line, reason) for n, (line, reason) in enumerate(zip(bad, reasons, strict=True), 2)]
    assert read(file) == [(1, "1", "a", "1"), (11, "1", "a", "1")]


JSON_CELLS = st.one_of(
    st.none(), st.text(max_size=4), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.integers(0, 9)), max_size=2), st.just({"b": 1}),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_json_cell_does_not_depend_on_its_neighbours(tmp_path_factory, data):
    """Values of one kind are read at once, others line by line: both give what the line says."""
    kind = data.draw(
        st.sampled_from([JSON_CELLS, st.text(), st.integers(-(2**70), 2**70), st.floats(-9, 9) | st.integers(0, 9)])
    )
    cells = data.draw(st.lists(kind | st.none(), max_size=6))
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    file.write_text(
        "".join(json.dumps({"b": "x", "a": cell}, ensure_ascii=False) + "\n" for cell in cells), encoding="utf-8"
    )
    lists = any(isinstance(cell, list) for cell in cells)

    def text(cell):
        return cell if cell is None or isinstance(cell, str) else json.dumps(cell)

    def expected(cell):
        if lists and cell is not None:
            return [text(part) for part in (cell if isinstance(cell, list) else [cell])]
        return text(cell)

    assert read(file, ["a"]) == numbered([(expected(cell),) for cell in cells])


# Parquet


def write_ids(path: Path, rows: int, group: int) -> str:
    pq.write_table(
        pa.table({"user_id": pa.array(range(rows)), "item_id": [f"项{i}" for i in range(rows)]}),
        path,
        row_group_size=group,
    )
    return str(path)


@pytest.mark.parametrize("group", [7, 30, 100, 1000])
def test_parquet_in_chunks_of_some_rows(tmp_path, monkeypatch, group):
    monkeypatch.setattr(parquet_rows, "ROWS", 30)
    file = write_ids(tmp_path / "log.parquet", 1000, group)
    found = list(raw.chunks(file, Source(path=file), ["item_id"]))
    assert max(len(chunk.frame) for chunk in found) == 30 - 30 % group if group < 30 else 30
    assert [i for chunk in found for i in chunk.frame["item_id"]] == [f"项{i}" for i in range(1000)]
    assert [row for chunk in found for row in chunk.rows] == list(range(1, 1001))
    for chunk in (*found, *found[::-1]):  # in any order
        last = chunk.rows[-1] - 1
        assert chunk.whole([len(chunk.rows) - 1, 0])[0] == f'{{"user_id":{last},"item_id":"项{last}"}}'
    assert raw.take(file, Source(path=file), [1, 31, 777]) == [
        f'{{"user_id":{i},"item_id":"项{i}"}}' for i in (0, 30, 776)
    ]


def test_long_rows_come_in_short_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "BYTES", 1 << 20)
    texts = [str(i) * 50_000 for i in range(10, 50)]
    pq.write_table(pa.table({"item_id": texts}), tmp_path / "items.parquet", use_dictionary=False)
    found = list(raw.chunks(str(tmp_path / "items.parquet"), Source(path=""), ["item_id"]))
    assert [len(chunk.frame) for chunk in found] == [10] * 4
    assert [text for chunk in found for text in chunk.frame["item_id"]] == texts


def test_pieces_of_large_parquet_files(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "PIECE", 100)
    text = write(tmp_path / "a.csv")
    files = [write_ids(tmp_path / f"{group}.parquet", 250, group) for group in (30, 100, 170, 999)]
    found = raw.pieces([Source(path="x"), Source(path="y")], [[text, files[0]], files[1:]])
    assert [(piece.number, piece.source, piece.file) for piece in found] == [
        (0, 0, text), *[(1, 0, files[0])] * 3, *[(2, 1, files[1])] * 3, *[(3, 1, files[2])] * 2, (4, 1, files[3])
    ]  # fmt: skip
    assert [piece.groups for piece in found] == [
        None, (0, 3), (3, 6), (6, 9), (0, 1), (1, 2), (2, 3), (0, 1), (1, 2), None
    ]  # fmt: skip
    rows = [row for piece in found[1:4] for row in read(piece.file, ["item_id"], piece.groups)]
    assert rows == [(i + 1, f"项{i}") for i in range(250)]


def test_parquet_without_rows(tmp_path):
    file = write_ids(tmp_path / "log.parquet", 0, 10)
    assert raw.pieces([Source(path="x")], [[file]]) == [raw.Piece(0, 0, file)]
    assert read(file, ["user_id"]) == []


def test_parquet_types(tmp_path):
    when, day = datetime.datetime(2017, 1, 1, 8), datetime.date(2017, 1, 1)
    columns = {
        "big": (pa.array([2**63 - 1, None]), [2**63 - 1, None], [2**63 - 1, None]),
        "unsigned": (pa.array([2**64 - 1, None], pa.uint64()), [2**64 - 1, None], [2**64 - 1, None]),
        "float": (pa.array([0.1, float("nan")]), [0.1, None], [0.1, None]),
        "bool": (pa.array([True, None]), [True, None], [True, None]),
        "nothing": (pa.nulls(2), [None, None], [None, None]),
        "text": (pa.array(['中"\n', None]), ['中"\n', None], ['中"\n', None]),
        "large": (pa.array(["甲", None], pa.large_string()), ["甲", None], ["甲", None]),
        "category": (pa.array(["甲", None]).dictionary_encode(), ["甲", None], ["甲", None]),
        "decimal": (pa.array([decimal.Decimal("1.10"), None]), ["1.10", None], ["1.10", None]),
        "id": (pa.array([10**37, None], pa.decimal128(38, 0)), [str(10**37), None], [str(10**37), None]),
        "wide": (pa.array([10**50, None], pa.decimal256(60, 0)), [str(10**50), None], [str(10**50), None]),
        "date": (pa.array([day, None]), [day, None], ["2017-01-01", None]),
        "far": (pa.array([10**8, None], pa.date32()), None, ["<value out of range: 100000000>", None]),
        "us": (pa.array([when, None]), [when, None], ["2017-01-01 08:00:00.000000", None]),
        "zone": (
            pa.array([when, None], pa.timestamp("ms", "+05:30")),
            [when.replace(tzinfo=datetime.UTC), None],
            ["2017-01-01 13:30:00.000+0530", None],
        ),
        "time": (pa.array([datetime.time(1, 2), None]), ["01:02:00.000000", None], ["01:02:00.000000", None]),
        "utf8": (pa.array(["甲".encode(), None]), ["甲", None], ["甲", None]),
        "bytes": (pa.array([b"\xff\x00", b"ok"]), ["/wA=", "ok"], ["/wA=", "ok"]),
        "fixed": (pa.array([b"\xff\x00", None], pa.binary(2)), ["/wA=", None], ["/wA=", None]),
        "list": (pa.array([["甲", None], None]), [["甲", None], None], [["甲", None], None]),
        "days": (pa.array([[day], None]), [["2017-01-01"], None], [["2017-01-01"], None]),
        "blobs": (pa.array([[b"\xff", None], []]), [["/w==", None], []], [["/w==", None], []]),
        "vector": (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), [[1, 2], None], [["1", "2"], None]),
        "struct": (pa.array([{"a": 1, "b": "中"}, None]), ['{"a": 1, "b": "中"}', None], [{"a": 1, "b": "中"}, None]),
        "structs": (pa.array([[{"a": 1}], None]), [['{"a": 1}'], None], [[{"a": 1}], None]),
        "deep": (pa.array([{"a": b"\xff"}, None]), ['{"a": "/w=="}', None], ['{"a": "/w=="}', None]),
        "map": (pa.array([{"k": 1}, None], pa.map_("string", "int8")), ['[["k", 1]]', None], ['[["k", 1]]', None]),
    }  # fmt: skip
    file = tmp_path / "log.parquet"
    pq.write_table(pa.table({name: column for name, (column, _, _) in columns.items()}), file)
    names = [name for name, (_, values, _) in columns.items() if values is not None]
    frame = next(raw.chunks(str(file), Source(path=""), names)).frame
    assert frame.with_columns(pl.col("float").fill_nan(None)).to_dict(as_series=False) == {
        name: columns[name][1] for name in names
    }
    assert read_whole(file) == [{name: shown[row] for name, (_, _, shown) in columns.items()} for row in (0, 1)]
    for name in ("list", "bool", "struct"):
        told = refusal(
            raw.check_columns, str(file), Source(path="", columns={"user_id": name}), ["user_id"], "data.events"
        )
        assert f"column '{name}' (data.events.columns.user_id): expected text or numbers, found " in told


# more than one file


def test_rows_that_are_gone(tmp_path):
    file = write(tmp_path / "log.csv")
    assert "expected 2 of its rows again, found 1: has it changed?" in refusal(
        raw.take, file, Source(path=file), [2, 4]
    )
