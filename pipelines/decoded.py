"""Text files as UTF-8, whatever their encoding and compression; and what is wrong with one that cannot be read."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mvrec_core.data import Source
from mvrec_core.errors import ConfigError, DataError, first_line
from mvrec_core.places import place
from pipelines.locations import form_of

BLOCK = 16 << 20  # bytes of text that are read together


def open_text(file: str, source: Source) -> pa.NativeFile:
    """A text file's content as UTF-8."""
    encoding = encoding_of(file, source)
    system, path, _ = place(file)
    stream = system.open_input_stream(path, compression=form_of(file, source)[1])
    return stream if encoding == "utf-8" else pa.transcoding_input_stream(stream, encoding, "utf-8")


def encoding_of(file: str, source: Source) -> str:
    """What Python calls the source's encoding. Raises ConfigError."""
    try:
        "a".encode(source.encoding)
        return codecs.lookup(source.encoding).name.removesuffix("-sig")
    except LookupError:
        known = "expected a name such as utf-8 or gb18030"
        raise ConfigError(f"{file}: unknown encoding '{source.encoding}'; {known}") from None


def open_for_threads(file: str, source: Source) -> pa.NativeFile:
    """As open_text, with no Python in it: where Arrow's threads decode, a reader that is dropped half-way can hang for
    ever on the interpreter's lock. So text of another encoding passes through an unnamed file on disk."""
    if encoding_of(file, source) == "utf-8":
        return open_text(file, source)
    with open_text(file, source) as stream, tempfile.NamedTemporaryFile() as copy:
        while data := stream.read(BLOCK):
            copy.write(data)
        copy.flush()
        return pa.OSFile(copy.name)


def guarded(file: str, source: Source, read: Callable[[], Any]) -> Any:
    try:
        try:
            return read()
        except (UnicodeError, pa.ArrowInvalid) as error:
            problem = first_line(error)
            if "straddling" in problem:
                raise DataError(f"{file}: a row is longer than {BLOCK >> 20} MB; is a quote left open?") from None
            raise DataError(f"{file}: {_misfit(file, source) or f'cannot be read: {problem}'}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


def _misfit(file: str, source: Source) -> str | None:
    """Where a text file leaves its encoding, if it does."""
    form, codec = form_of(file, source)
    if form == "parquet":
        return None
    encoding = encoding_of(file, source)
    expected = f"expected {encoding.upper()} (set encoding, e.g. encoding: gb18030)"
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    system, path, _ = place(file)
    with system.open_input_stream(path, compression=codec) as stream:
        while True:
            data = stream.read(BLOCK)
            try:
                line += decoder.decode(data, final=not data).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                return f"line {line}: {expected}, found byte 0x{error.object[error.start]:02x}"
            except UnicodeError as error:
                return f"{expected}: {first_line(error)}"
            if not data:
                return None
