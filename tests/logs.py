"""Small logs of the prepare tests, and what `prepare` made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mvrec_core.config import Config
from mvrec_core.reading import parse_config
from pipelines.prepare import prepare

EVENTS = [  # user, item, timestamp, rating
    ("u1", "喜剧", "100", "5"),
    ("u2", "b", "50", "3"),
    ("u1", "b", "100", "4"),
    ("u1", "مرحبا", "100.0", "2"),
    ("u1", "a", "90", "x"),
    ("u2", "a", "40", ""),
    ("مريم", "b", "7", "1"),
    ("u2", "zz", "60", "2"),
]
ITEMS = "item_id,title,genres,year\na,玩具总动员,x|y,1995\nb,, ,\n喜剧,مرحبا بالعالم,y,1997\nمرحبا,Last,,abc\n"
USERS = "user_id,job\nu1,baker\nu2,\n"


def write_events(directory: Path, parts: int = 1, rows=EVENTS, first: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // parts)
    for part in range(parts):
        lines = ["user_id,item_id,timestamp,rating", *(",".join(r) for r in rows[part * size : (part + 1) * size])]
        (directory / f"log-{first + part:02d}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(tmp_path: Path, logs: Path, name: str = "run", **data) -> Config:
    (tmp_path / "items.csv").write_text(ITEMS, encoding="utf-8")
    (tmp_path / "users.csv").write_text(USERS, encoding="utf-8")
    tree = {
        "name": name,
        "runs": str(tmp_path / "runs"),
        "data": {
            "events": {"path": str(logs / "log-*.csv")},
            "items": {"path": str(tmp_path / "items.csv")},
            "users": {"path": str(tmp_path / "users.csv")},
            "buckets": 3,
        }
        | data,
        "views": {
            "id": {"kind": "id"},
            "text": {"kind": "text", "columns": ["title", "genres"]},
            "genres": {"kind": "category", "level": "item", "column": "genres", "separator": "|"},
            "year": {"kind": "number", "level": "item", "column": "year"},
            "rating": {"kind": "number", "level": "event", "column": "rating"},
            "time": {"kind": "time"},
            "job": {"kind": "category", "level": "user", "column": "job"},
        },
        "model": {"text": {"path": "unused"}},
    }
    return parse_config(tree, "test")


def run(config: Config, **how: Any) -> dict[str, Any]:
    return prepare(config, log=lambda line: None, **how)


def histories(config: Config) -> dict[str, list[tuple]]:
    """user -> [(item, timestamp, split, rating)], out of events/ and views/rating/ and then those of test/."""
    rows: dict[str, list[tuple]] = {}
    for root in (config.run_dir / "prepared", config.run_dir / "prepared" / "test"):
        for file in sorted((root / "events").glob("*/part-0.parquet")):
            users = pq.read_table(file, partitioning=None).to_pylist()
            path = root / "views" / "rating" / file.parent.name / file.name
            ratings = pq.read_table(path, partitioning=None).to_pylist()
            assert [u["user_id"] for u in users] == [r["user_id"] for r in ratings]
            assert [u["user_id"] for u in users] == sorted(u["user_id"] for u in users)
            for user, rating in zip(users, ratings, strict=True):
                events = zip(user["item"], user["timestamp"], user["split"], rating["value"], strict=True)
                rows.setdefault(user["user_id"], []).extend(events)
    return rows


def rejected(config: Config) -> list[tuple[str, str, int, str, str]]:
    """source, file name, row, reason, row as JSON; sorted."""
    found = []
    for path in (config.run_dir / "prepared" / "rejected").glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            found.append((row["source"], Path(row["file"]).name, row["row"], row["reason"], row["raw"]))
    return sorted(found)


def contents(root: Path) -> dict[str, bytes]:
    """Each file below a directory."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
