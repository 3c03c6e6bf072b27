"""Checkpoints that are copied to where services find them: a folder, or an object store.

A release is <to>/<model_version>. Its manifest is written last, so a reader sees a whole one or none. Whoever reads one
of an object store keeps it in a folder of this user, where all processes of the machine find it, also while the store
does not answer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import copy_files

from mvrec_core import places
from mvrec_core.errors import CheckpointError, ResourceError, first_line
from mvrec_core.sealed import MANIFEST, verify

KEPT = 4  # releases on this machine, the last that were read
FAILURES = (OSError, pa.ArrowException)


def local(checkpoint: str | Path) -> Path:
    """A checkpoint as a directory of this machine; one at a URI is copied here, unless it is here already.

    Raises CheckpointError where there is none or it is not whole, ResourceError where it cannot be kept, DataError for
    a URI with a password.
    """
    name = str(checkpoint)
    if not places.is_uri(name):
        return Path(name)
    folder = kept_folder("releases")
    if is_kept(name):
        return _used(folder / _last_part(name))
    try:
        manifest = json.loads(places.read(places.below(name, MANIFEST)))
        version, files = str(manifest["model_version"]), [*manifest["files"]]
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no such checkpoint: it has no {MANIFEST}") from None
    except FAILURES as error:
        raise CheckpointError(f"{name}: cannot be read: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{name}/{MANIFEST}: damaged: expected JSON with 'model_version' and 'files'") from None
    target = folder / version
    if not version.isalnum() or any(not _inside(file) for file in files):
        raise CheckpointError(f"{name}/{MANIFEST}: damaged: expected names of files in the checkpoint")
    if not _whole(target):
        shutil.rmtree(target, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        try:
            _fetch(name, [*files, MANIFEST], aside)
            verify(aside)
            _appear(aside, target)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(aside), name)) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return _used(target)


def is_kept(name: str) -> bool:
    """Whether the release at a URI is here, by its name, which is its version."""
    return places.is_uri(name) and _whole(kept_folder("releases") / _last_part(name))


def kept_folder(what: str) -> Path:
    """Of what this machine keeps of object stores. Raises ResourceError."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvrec" / what
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise ResourceError(f"cannot keep {what} on this machine: {error}; set XDG_CACHE_HOME") from None
    return folder


def send(directory: Path, to: str) -> str:
    """Copies a checkpoint to <to>/<model_version>, which it returns; one that is there already is left.

    Raises CheckpointError where the checkpoint is not whole, ResourceError where it cannot be written.
    """
    manifest = verify(directory)
    try:
        to = to if places.is_uri(to) else str(Path(to).absolute())
        target = places.below(to, manifest["model_version"])
        system, path, _ = places.place(target)
        there = system.get_file_info(f"{path}/{MANIFEST}").is_file
        for file in () if there else [*manifest["files"], MANIFEST]:
            system.create_dir(f"{path}/{file}".rpartition("/")[0], recursive=True)
            copy_files(str(directory.absolute() / file), f"{path}/{file}", destination_filesystem=system)
    except FAILURES as error:
        raise ResourceError(f"cannot write a release to {to}: {first_line(error)}") from None
    return target


def _fetch(name: str, files: list[str], aside: Path) -> None:
    system, path, _ = places.place(name)
    for file in files:
        try:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            copy_files(f"{path}/{file}", str(aside / file), source_filesystem=system)
        except FileNotFoundError:
            raise CheckpointError(f"{name}/{file}: missing, but the manifest lists it") from None
        except FAILURES as error:
            raise CheckpointError(f"{name}/{file}: cannot be copied here: {first_line(error)}") from None


def _whole(target: Path) -> bool:
    try:
        verify(target)
    except CheckpointError:
        return False
    return True


def _appear(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError:  # another process was first
        if not target.is_dir():
            raise


def _used(target: Path) -> Path:
    target.touch()
    for old in sorted(target.parent.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _last_part(name: str) -> str:
    uri = places.URI.fullmatch(name)
    return "" if uri is None else uri[2].rstrip("/").rpartition("/")[2]


def _inside(file: str) -> bool:
    parts = Path(file).parts
    return bool(parts) and ".." not in parts and not Path(file).is_absolute()
