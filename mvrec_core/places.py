"""Where files lie: on this machine, or in an object store.

A file is named by its path or by a URI that pyarrow.fs.FileSystem.from_uri knows: s3://bucket/key, gs://bucket/key,
file:///path. Credentials and region come from the environment, as the stores' own tools read them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS), never from the URI,
which is written into the prepared data. Another S3 server is named by AWS_ENDPOINT_URL or in the URI's query:
s3://bucket/key?endpoint_override=host:port&scheme=http.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from mvrec_core.errors import DataError

URI = re.compile(r"([A-Za-z][\w+.-]*://[^/?]*)(.*?)(\?\w+=.*)?")  # scheme and host, path, query


def is_uri(name: str) -> bool:
    return URI.fullmatch(name) is not None


def place(name: str) -> tuple[FileSystem, str, Callable[[str], str]]:
    """The file system of a path or URI, the path in it, and how a path in it is written in the manner of `name`."""
    uri = URI.fullmatch(name)
    if uri is None:
        return LocalFileSystem(), name, lambda path: path
    root, path, query = uri[1], uri[2], uri[3] or ""
    if re.search("://[^@]*:[^@]*@", root):
        raise DataError(f"{root.partition('//')[0]}//...: expected no password in a URI; the environment gives it")
    system, base = FileSystem.from_uri(f"{root}/{query}")
    base = base.rstrip("/")

    def written(path: str) -> str:
        return root + path.removeprefix(base).replace("%", "%25").replace("?", "%3F") + query

    return system, base + unquote(path), written


def below(name: str, part: str) -> str:
    """The path or URI of a file in a folder."""
    _, path, written = place(name)
    return written(f"{path.rstrip('/')}/{part}")


def kind(name: str) -> FileType:
    """Whether it is a file, a folder or nothing. Raises OSError."""
    system, path, _ = place(name)
    return system.get_file_info(path.rstrip("/") or "/").type


def read(name: str) -> bytes:
    """Raises OSError, FileNotFoundError where there is no such file."""
    system, path, _ = place(name)
    with system.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write(name: str, content: bytes) -> None:
    """Raises OSError. In an object store it is whole or not there."""
    system, path, _ = place(name)
    with system.open_output_stream(path, compression=None) as stream:
        stream.write(content)
