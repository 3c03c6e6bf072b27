"""A small, fixed data set with real structure: most users go from item i to item i + 1."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pyarrow as pa
import torch

from mvrec_core.catalog import Catalog, Vocabulary
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.features import Fitted
from mvrec_core.reading import load_config
from mvrec_core.sequences import TEST, TRAIN, VALID

CONFIG = Path(__file__).parent.parent / "pipelines" / "configs" / "tiny.yaml"
USERS = 101  # with three events or more, so with a validation and a test event
ITEMS = 40
SHORT = {"short0": 1, "short1": 2, "short2": 2}  # user -> events
TITLES = {0: "流浪地球", 1: "قصة لعبة", 2: "卧虎藏龙 2", 3: "Café Noir"}
GENRES = ("Drama", "Comedy", "科幻", "Action")
NO_TEXT, NO_YEAR = "i07", "i05"
START = 1_500_000_000
TEXTS = [
    "title: 流浪地球",
    "title: b",
    None,
    "title: a longer one 12",
    "title: b",
]  # of an encoder alone: three distinct


def item_rows() -> list[dict[str, str]]:
    rows = []
    for n in range(ITEMS):
        genres = GENRES[n % 4] + ("|" + GENRES[(n + 1) % 4] if n % 3 == 0 else "")
        title = TITLES.get(n, f"film number {n}")
        rows.append({"item_id": f"i{n:02d}", "title": title, "genres": genres, "year": str(1980 + n)})
    rows[7] |= {"title": "", "genres": ""}
    rows[5]["year"] = ""
    return rows


def user_rows() -> list[dict[str, str]]:
    names = [f"u{n:03d}" for n in range(USERS)] + list(SHORT)
    return [{"user_id": name, "gender": "FM"[n % 2]} for n, name in enumerate(names)]


def event_rows() -> list[dict[str, str]]:
    draw = random.Random(7)
    lengths = {f"u{n:03d}": 3 + n % 12 for n in range(USERS)} | SHORT
    rows = []
    for n, (user, length) in enumerate(lengths.items()):
        item, when = (7 * n) % ITEMS, START + 1000 * n
        for step in range(length):
            rating = "" if draw.random() < 0.1 else str(draw.randint(1, 5))
            rows.append({"user_id": user, "item_id": f"i{item:02d}", "timestamp": str(when), "rating": rating})
            item = (item + (1 if draw.random() < 0.9 else 3)) % ITEMS
            when += 0 if step % 4 == 1 else draw.choice([30, 4000, 90_000])  # ties, minutes, hours, days
    return rows


def write_logs(directory: Path) -> Path:
    for name, rows in (("items", item_rows()), ("users", user_rows()), ("events", event_rows())):
        with (directory / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return directory


def write_encoder(directory: Path) -> Path:
    """A random BERT of two layers, in the form in which transformers loads any."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    others = sorted({c for text in (*TITLES.values(), *GENRES) for c in text.lower() if c not in letters + " "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", ",", ".", "|", "film", "title", "genres", "number"]
    words += [*letters, *others] + [f"##{c}" for c in [*letters, *others]]
    words = list(dict.fromkeys(words))
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(directory)
    return directory


def config(encoder: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"model.text.path={encoder}", *overrides])


def data() -> Data:
    """The same logs as prepared data, built without Ray; and two users whose only event is of no known item:
    "ghost" has a profile, "nobody" has none."""
    items = item_rows()
    texts = [_join(title=row["title"], genres=row["genres"]) for row in items]
    genres = [row["genres"].split("|") if row["genres"] else None for row in items]
    years = [float(row["year"]) if row["year"] else None for row in items]
    ids = [row["item_id"] for row in items]
    catalog = Catalog(
        pa.table(
            {
                "item_id": ids,
                "display": [row["title"] or None for row in items],
                "text": pa.array(texts, pa.string()),
                "genres": pa.array(genres, pa.list_(pa.string())),
                "year": pa.array(years, pa.float64()),
            }
        )
    )
    fitted = Fitted(
        {"genres": Vocabulary(sorted(GENRES)), "gender": Vocabulary(["F", "M"])},
        {"year": (2000.0, 10.0), "rating": (3.0, 1.5)},
    )
    genders = {row["user_id"]: [row["gender"]] for row in user_rows()} | {"ghost": ["F"], "nobody": None}
    events: dict[str, list[dict[str, str]]] = {name: [] for name in genders}
    for row in event_rows():
        events[row["user_id"]].append(row)
    for name in ("ghost", "nobody"):
        events[name].append({"item_id": "gone", "timestamp": str(START), "rating": "3"})
    times = [[int(row["timestamp"]) * 1_000_000 for row in rows] for rows in events.values()]
    users = pa.table(
        {
            "user_id": list(events),
            "item": [[row["item_id"] for row in rows] for rows in events.values()],
            "timestamp": pa.array(times, pa.list_(pa.int64())),
            "split": pa.array([_split(len(rows)) for rows in events.values()], pa.list_(pa.int8())),
            "event.rating": pa.array(
                [[float(row["rating"]) if row["rating"] else None for row in rows] for rows in events.values()],
                pa.list_(pa.float64()),
            ),
            "event.time": pa.array(times, pa.list_(pa.int64())),
            "user.gender": pa.array(list(genders.values()), pa.list_(pa.string())),
        }
    )
    return Data(catalog, fitted, users)


def _join(**columns: str) -> str | None:
    return " ".join(f"{name}: {value}" for name, value in columns.items() if value) or None


def _split(length: int) -> list[int]:
    return [TRAIN] * length if length < 3 else [TRAIN] * (length - 2) + [VALID, TEST]


def history_of(user: str) -> list[str]:
    return [row["item_id"] for row in event_rows() if row["user_id"] == user]
