"""The borders between the folders, and the order of the files within the core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors",
    "addresses",
    "node",
    "data",
    "views",
    "config",
    "reading",
    "places",
    "sealed",
    "releases",
    "schema",
    "catalog",
    "features",
    "sequences",
    "graph",
    "shards",
    "cleaning",
    "batch",
    "workers",
    "sharding",
    "tuning",
    "frozen_layers",
    "text",
    "encoders",
    "repeats",
    "fusion",
    "sequence_encoder",
    "losses",
    "metrics",
    "paired",
    "calibration",
    "drift",
    "attributes",
    "rules",
    "policy",
    "index",
    "diversity",
    "beyond_accuracy",
    "past",
    "model",
    "ranking",
    "checkpoint",
    "prefetch",
    "averaging",
    "resume",
    "batches",
    "learner",
    "training",
    "baselines",
    "hybrid",
    "requests",
    "masking",
    "explanations",
    "answers",
    "live_items",
    "reference",
    "pretrained",
    "masked_tokens",
    "pretext",
    "pretraining",
    "stored_users",
    "recommender",
    "ablations",
)
FILES = [path for folder in ("mvrec_core", "pipelines", "serve") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth: "from a import b" gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {str(node.module)} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_arrows_between_folders_point_one_way(path):
    forbidden = {"mvrec_core": {"ray", "pipelines", "serve"}, "pipelines": {"serve"}, "serve": {"pipelines"}}
    assert not roots(path) & (forbidden[path.relative_to(ROOT).parts[0]] | {"tests", "bench"})


def test_the_reader_of_imports_sees_those_in_functions(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    if 1:\n        from ray.data import x\n    import serve.app as y\n")
    assert imports(tmp_path / "a.py") == {"ray.data", "ray.data.x", "serve.app"}
    assert roots(tmp_path / "a.py") == {"ray", "serve"}


def test_every_file_of_the_core_has_its_place():
    assert sorted(ORDER) == sorted(p.stem for p in (ROOT / "mvrec_core").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_a_file_of_the_core_imports_only_earlier_ones(place):
    used = {part.split(".")[1] for part in imports(ROOT / "mvrec_core" / f"{ORDER[place]}.py") if "mvrec_core." in part}
    assert used <= set(ORDER[:place])


@pytest.mark.parametrize("folder", ["mvrec_core", "pipelines", "serve"])
def test_importing_does_nothing(folder):
    modules = [name(p)[:-3].replace("/", ".") for p in FILES if p.is_relative_to(ROOT / folder)]
    modules = [m.removesuffix(".__init__") for m in modules if not m.endswith("__main__")]
    code = f"import sys, threading\nfor m in {modules}: __import__(m)\n"
    code += "assert threading.active_count() == 1\n"
    if folder == "mvrec_core":
        code += "assert 'ray' not in sys.modules and 'transformers' not in sys.modules"
    else:
        code += "import ray; assert not ray.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
