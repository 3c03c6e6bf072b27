"""Directories with a manifest that has a hash for each of their files, so that half of one is never taken for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mvrec_core.errors import CheckpointError

FORMAT = 4
MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Writes manifest.json: format, a version that follows from all files, and the sha256 of each."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {path.relative_to(directory).as_posix(): sha256(path) for path in paths}
    version = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    manifest = {"format": FORMAT, "model_version": version, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(directory: Path) -> dict:
    """The manifest of a sealed directory whose files are all there and unchanged. Raises CheckpointError."""
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so {directory} is not a whole checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: expected JSON with 'format' and 'files'") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {version}")
    for name, digest in files.items():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: missing, but the manifest lists it")
        found = sha256(directory / name)
        if found != digest:
            raise CheckpointError(f"{directory / name}: damaged: expected sha256 {digest[:12]}…, found {found[:12]}…")
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
