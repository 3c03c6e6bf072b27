"""The manifest of prepared data, written last, and the state from which an increment goes on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mvrec_core.config import Config
from mvrec_core.errors import DataError
from mvrec_core.sealed import sha256
from pipelines import files
from pipelines.buckets import Made
from pipelines.catalogue import SCHEMA_VERSION
from pipelines.spool import Filled
from pipelines.tables import Table

POINTS = 1000  # of the popularity curve


@dataclass(frozen=True)
class State:
    """What was read and made so far.

    events: the source and the name of each event file, in the order of their numbers
    files:  bytes and sha256 of each file that was read
    """

    generation: int
    buckets: int
    events: list[tuple[int, str]]
    files: dict[str, list[Any]]
    rows: int
    reasons: dict[str, int]
    unread: dict[str, int]
    made: list[Made]

    @staticmethod
    def of(events: Sequence[tuple[int, str]], filled: Sequence[Filled], made: Sequence[Made]) -> State:
        reasons, unread = Counter[str](), Counter[str]()
        for one in filled:
            reasons.update(one.reasons)
            unread.update(one.unread)
        read = {name: list(file) for one in filled for name, file in one.files.items()}
        rows = sum(one.rows for one in filled)
        return State(0, len(made), list(events), read, rows, dict(reasons), dict(unread), list(made))

    def then(self, new: State) -> State:
        """After an increment, of which `new` holds what it read, and all buckets."""
        return State(
            self.generation + 1,
            new.buckets,
            self.events + new.events,
            self.files | new.files,
            self.rows + new.rows,
            dict(Counter(self.reasons) + Counter(new.reasons)),
            dict(Counter(self.unread) + Counter(new.unread)),
            new.made,
        )

    def save(self, root: Path) -> None:
        files.write_text(root / "spool" / "state.json", json.dumps(asdict(self), ensure_ascii=False))

    @staticmethod
    def load(root: Path) -> State:
        """Raises DataError where there is none."""
        try:
            tree = json.loads((root / "spool" / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{root}: no prepared data to go on from; run 'mvrec prepare' first") from None
        made = [Made(**one) for one in tree.pop("made")]
        return State(**tree | {"made": made, "events": [tuple(event) for event in tree["events"]]})


def load(root: Path) -> dict[str, Any]:
    """The manifest. Raises DataError where there is none, or one of another version."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{root}: no prepared data (no manifest.json); run 'mvrec prepare' first") from None
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{root}: expected schema version {SCHEMA_VERSION}, found {manifest['schema_version']}; "
            "run 'mvrec prepare' again"
        )
    return manifest


def build(
    config: Config,
    state: State,
    tables: Mapping[str, Table],
    names: Mapping[str, Sequence[str]],
    facts: Mapping[str, Any],
    out: Path,
    seconds: float,
) -> dict[str, Any]:
    """tables: the rows of items and users; names: their files, and those of views; facts: what `catalogue.write`
    returned."""
    made = state.made
    rejected = {"events": Counter(state.reasons)}
    for one in made:
        rejected["events"].update(one.reasons)
    kept = {"events": sum(one.kept for one in made)} | {key: len(table.frame) for key, table in tables.items()}
    rows = {"events": state.rows} | {key: table.rows for key, table in tables.items()}
    for key, table in tables.items():
        rejected[key] = Counter(table.rejected["reason"].to_list())
    unread = Counter(state.unread)
    for table in tables.values():
        unread.update(table.unread)
    read = [{"source": "events", "file": file} for _, file in state.events]
    read += [{"source": key, "file": file} for key, found in names.items() for file in found]
    spans = [one.span for one in made if one.span]
    span = [min(first for first, _ in spans), max(last for _, last in spans)]
    missing = facts["missing"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "config": json.loads(config.model_dump_json(include={"data", "views"})),
        "sources": [one | dict(zip(("bytes", "sha256"), state.files[one["file"]], strict=True)) for one in read],
        "rows": {key: {"in": rows[key], "kept": kept[key], "rejected": rejected[key].total()} for key in rows},
        "rejected": {key: dict(sorted(reasons.items())) for key, reasons in rejected.items()},
        "users": sum(one.users for one in made),
        "short_users": sum(one.short_users for one in made),
        "items": facts["items"],
        "unknown_items": facts["unknown_items"],
        "items_without_text": facts["items_without_text"],
        "events": dict(zip(("train", "valid", "test"), np.sum([one.splits for one in made], 0).tolist(), strict=True)),
        "span": [datetime.fromtimestamp(time // 1_000_000, UTC).isoformat() for time in span],
        "vocabulary": facts["vocabulary"],
        "views": {
            name: {
                "kind": view.kind,
                "level": view.level,
                "values": missing[name][0] - missing[name][1],
                "missing": missing[name][1],
                "unreadable": unread[name],
            }
            for name, view in config.views.items()
        },
        "conflicts": {key: table.conflicts for key, table in tables.items()},
        "days": _days(made),
        "history_lengths": _lengths(made),
        **_popularity(facts["item_events"]),
        "buckets": state.buckets,
        "content_hash": content_hash(made, out),
        "seconds": seconds,
    }


def content_hash(made: Sequence[Made], out: Path) -> str:
    """Of every file of events, views, test, items, users and what was fitted: the same for the same rows, however they
    were cut into files or shared out over tasks."""
    digests = {name: digest for one in made for name, digest in one.files.items()}
    for file in [*out.glob("items/*.parquet"), *out.glob("users/*.parquet"), out / "fitted.json", out / "views.json"]:
        digests[file.relative_to(out).as_posix()] = sha256(file)
    return hashlib.sha256(
        "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()


def _days(made: Sequence[Made]) -> dict[str, list[int]]:
    days: dict[int, np.ndarray] = {}
    for one in made:
        for day, counts in one.days.items():
            days[int(day)] = days.get(int(day), np.zeros(3, np.int64)) + counts
    return {(date(1970, 1, 1) + timedelta(day)).isoformat(): days[day].tolist() for day in sorted(days)}


def _lengths(made: Sequence[Made]) -> dict[str, int]:
    counts = Counter[int]()
    for one in made:
        counts.update({int(top): users for top, users in one.lengths.items()})
    tops = [1 << power for power in range(max(counts).bit_length())]
    return {f"{top // 2 + 1}-{top}" if top > 2 else str(top): counts[top] for top in tops}


def _popularity(events: np.ndarray) -> dict[str, list[int]]:
    """events: of each item of the log"""
    counts = np.sort(events)[::-1]
    ranks = np.unique(np.geomspace(1, len(counts), POINTS).round().astype(int))
    return {"popularity": counts[ranks - 1].tolist(), "popularity_ranks": ranks.tolist()}
