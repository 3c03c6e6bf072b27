"""What a view reads, as arrays: categories as indices, numbers standardised, times as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mvrec_core.catalog import FIRST, PAD, Vocabulary
from mvrec_core.config import Config
from mvrec_core.views import View

MISSING_TIME = np.iinfo(np.int64).min
MAX_VALUES = 16  # of a multi-valued category; more are cut


@dataclass(frozen=True)
class Fitted:
    """What was learned from train about the values of each view."""

    vocabularies: Mapping[str, Vocabulary]
    scales: Mapping[str, tuple[float, float]]  # mean, standard deviation
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # the same of D numbers, float32

    @staticmethod
    def load(path: Path) -> Fitted:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Fitted(
            {name: Vocabulary(fit["values"]) for name, fit in tree.items() if fit["kind"] == "category"},
            {name: (fit["mean"], fit["std"]) for name, fit in tree.items() if fit["kind"] == "number"},
            {
                name: (np.array(fit["mean"], np.float32), np.array(fit["std"], np.float32))
                for name, fit in tree.items()
                if fit["kind"] == "vector"
            },
        )

    def to_json(self) -> str:
        tree: dict[str, dict] = {}
        for name, vocabulary in self.vocabularies.items():
            tree[name] = {"kind": "category", "values": vocabulary.values.to_pylist()}
        for name, (mean, std) in self.scales.items():
            tree[name] = {"kind": "number", "mean": mean, "std": std}
        for name, (means, stds) in self.vectors.items():
            tree[name] = {"kind": "vector", "mean": means.tolist(), "std": stds.tolist()}
        return json.dumps(tree, ensure_ascii=False, sort_keys=True)

    def encode(self, name: str, view: View, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Of n values of a view: category -> int64 [n, M], padded with PAD; number -> float32 [n], NaN where missing;
        vector -> float32 [n, D], all NaN where missing; time -> int64 [n] microseconds, MISSING_TIME where missing."""
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if view.kind == "category":
            return _categories(self.vocabularies[name], values)
        if view.kind == "number":
            mean, std = self.scales[name]
            numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
            return ((numbers - mean) / (std or 1.0)).astype(np.float32)
        if view.kind == "vector":
            return _vectors(*self.vectors[name], values)
        return values.cast(pa.int64()).fill_null(int(MISSING_TIME)).to_numpy(zero_copy_only=False)


def item_features(config: Config, table: pa.Table, fitted: Fitted, rows_before: int = FIRST) -> dict[str, torch.Tensor]:
    """{view: [rows_before + n, ...]} of the category, number and vector views of a table of items; rows before are
    empty."""
    out = {}
    for name, view in config.views_at("item").items():
        if view.kind in ("category", "number", "vector"):
            values = fitted.encode(name, view, table[name])
            filler = np.full((rows_before, *values.shape[1:]), PAD if view.kind == "category" else np.nan, values.dtype)
            out[name] = torch.from_numpy(np.concatenate([filler, values]))
    return out


def _vectors(mean: np.ndarray, std: np.ndarray, values: pa.ListArray) -> np.ndarray:
    out = np.full((len(values), len(mean)), np.nan, np.float32)
    there = values.is_valid().to_numpy(zero_copy_only=False)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    out[there] = (flat.reshape(-1, len(mean)) - mean) / np.where(std > 0, std, 1)
    return out


def _categories(vocabulary: Vocabulary, values: pa.ListArray) -> np.ndarray:
    size = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    out = np.zeros((len(values), max(1, min(int(size.max(initial=0)), MAX_VALUES))), np.int64)
    flat = vocabulary.index(values.flatten())
    row = np.repeat(np.arange(len(values)), size)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(size) - size, size)
    kept = place < out.shape[1]
    out[row[kept], place[kept]] = flat[kept]
    return out
