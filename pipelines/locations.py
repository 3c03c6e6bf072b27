"""Where raw files lie: find the files that a path, a folder, a pattern or a URI names, and what their names tell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from mvrec_core.data import Source
from mvrec_core.errors import DataError, first_line
from mvrec_core.places import URI, place

ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
CODECS = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 16 << 20  # bytes of a file read at a time


def find(source: Source, key: str) -> list[str]:
    """The files of a source in the order of its patterns, each pattern's sorted by path.

    A pattern is a file, a folder (the files with a known ending anywhere below it) or a glob, where ** is any number of
    folders. Names that begin with . or _, such as _SUCCESS, are left out unless the pattern spells that out.
    Raises DataError.
    """
    files: list[str] = []
    for pattern in source.paths:
        try:
            files += _found(pattern, key)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{key}.path: '{pattern}' cannot be listed: {first_line(error)}") from None
    return list(dict.fromkeys(files))  # overlapping patterns give a file once


def size(file: str) -> int:
    """Bytes of the file as it lies there. Raises OSError."""
    system, path, _ = place(file)
    return system.get_file_info(path).size


def fingerprint(file: str) -> tuple[int, str]:
    """Bytes of the file as it lies there, and their sha256. Raises OSError."""
    system, path, _ = place(file)
    digest, length = hashlib.sha256(), 0
    with system.open_input_stream(path, compression=None) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            length += len(block)
    return length, digest.hexdigest()


def _found(pattern: str, key: str) -> list[str]:
    system, path, written = place(pattern)
    path = path.rstrip("/") or "/"
    kind = system.get_file_info(path).type
    if kind == FileType.File:
        return [pattern]
    if kind == FileType.Directory:
        paths = _below(system, path)
        if not paths:
            known = ", ".join(ENDINGS)
            raise DataError(f"{key}.path: folder '{pattern}': expected files that end in {known}, found none")
    else:
        paths = _globbed(system, path)
        if not paths:
            raise DataError(f"{key}.path: no such file: '{pattern}'")
    return [written(path) for path in sorted(set(paths))]


def _below(system: FileSystem, folder: str) -> list[str]:
    infos = system.get_file_info(FileSelector(folder, recursive=True))
    paths = [info.path for info in infos if info.type == FileType.File and _endings(info.path)[0] in ENDINGS]
    return [path for path in paths if not any(map(_hidden, _parts(path, folder)))]


def _globbed(system: FileSystem, pattern: str) -> list[str]:
    parts = pattern.split("/")
    fixed = next((place for place, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    base = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")
    paths: list[str] = []
    for info in _matched(system, base, parts[fixed:]) if fixed < len(parts) else ():
        paths += [info.path] if info.type == FileType.File else _below(system, info.path)
    return [path.removeprefix("./") for path in paths] if base == "." else paths


def _matched(system: FileSystem, folder: str, parts: Sequence[str]) -> Iterator[FileInfo]:
    """The files and folders below a folder that fit the parts of a pattern; what ** may stand for is listed at once."""
    deep = parts[0] == "**"
    for info in system.get_file_info(FileSelector(folder, allow_not_found=True, recursive=deep)):
        if not _fits(_parts(info.path, folder), parts if deep else parts[:1]):
            continue
        if deep or len(parts) == 1:
            yield info
        elif info.type == FileType.Directory:
            yield from _matched(system, info.path, parts[1:])


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (not _hidden(names[0]) and _fits(names[1:], parts))
    seen = _hidden(parts[0]) or not _hidden(names[0])
    return seen and fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _parts(path: str, folder: str) -> list[str]:
    return path.removeprefix(folder).strip("/").split("/")


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _endings(file: str) -> tuple[str, str | None]:
    """The ending that tells the format, and the codec of a compressed file."""
    uri = URI.fullmatch(file)
    endings = ["", *(ending.lower() for ending in PurePosixPath(uri[2] if uri else file).suffixes)]
    codec = CODECS.get(endings[-1])
    return endings[-2 if codec else -1], codec


def form_of(file: str, source: Source) -> tuple[str, str | None]:
    """The format, and the codec of a compressed file. Raises DataError."""
    ending, codec = _endings(file)
    form = source.format or ENDINGS.get(ending)
    if form is None:
        raise DataError(f"{file}: its format cannot be told from '{ending}'; set format to csv, tsv, jsonl or parquet")
    if form == "parquet" and codec:
        raise DataError(f"{file}: expected Parquet as it is, which compresses its own columns, found it in {codec}")
    return form, codec
