"""A checkpoint: one directory that holds all that inference needs, with a hash for each file.

config.json          the run's configuration
model.safetensors    every weight but the text encoder's, and the vectors of the catalogue's texts
text_encoder/        the tuned encoder and its tokenizer, where there is a text view; with model.text.save "adapter"
                     just what was learnt, and the path and sha256 of the encoder that it belongs to
fitted.json          vocabularies and scales
items.parquet        the catalogue in index order
item_vectors.npy     float32 [N, D], unit vectors; rows PAD and UNKNOWN are zero
users.parquet        histories and profiles, a row a user
metrics.json         validation metrics of this model
reference.json       scores and view weights of validation users, to measure drift by; where there were such users
manifest.json        format version, model version, sha256 of each file
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from mvrec_core import graph
from mvrec_core.catalog import FIRST, Catalog
from mvrec_core.config import Config
from mvrec_core.drift import Reference
from mvrec_core.encoders import GAPS, gap_bucket
from mvrec_core.errors import CheckpointError, MVRecError
from mvrec_core.features import Fitted
from mvrec_core.model import MVRec
from mvrec_core.reading import parse_config
from mvrec_core.releases import local
from mvrec_core.sealed import seal, verify
from mvrec_core.sequences import VALID, Histories
from mvrec_core.shards import Shards


@dataclass(frozen=True)
class Data:
    """What a model is trained on: the catalogue, what was fitted on train, and a table of a row a user with
    user_id, lists item, timestamp, split, "event.<view>", and "user.<view>"."""

    catalog: Catalog
    fitted: Fitted
    users: pa.Table

    def histories(self, config: Config) -> Histories:
        return Histories.from_table(self.users, config, self.catalog.ids, self.fitted)

    def shards(self, config: Config) -> Shards:
        """The histories as one shard."""
        return Shards.whole(self.histories(config))


@dataclass(frozen=True)
class Checkpoint:
    config: Config
    model: MVRec
    data: Data
    item_vectors: torch.Tensor  # [N, D]
    model_version: str
    reference: Reference | None = None


def new_model(config: Config, data: Data, shards: Shards, before: int = VALID) -> MVRec:
    """An untrained model for the events of the splits below `before`; the same seed gives the same weights."""
    torch.manual_seed(config.seed)
    counts, gaps = np.zeros(FIRST + len(data.catalog), np.int64), np.zeros(GAPS, np.int64)
    for histories in shards:
        learnt = histories.before(before)
        counts += np.bincount(learnt.item, minlength=len(counts))
        gaps += np.bincount(gap_bucket(*map(torch.from_numpy, learnt.gaps())), minlength=GAPS)
    model = MVRec(config, data.catalog, data.fitted, torch.from_numpy(counts))
    if model.until is not None:
        model.until.learn_from(gaps)
    for name, view in config.views.items():
        if view.kind == "graph":
            found = graph.vectors(shards, len(counts), before, view.size, view.window)
            getattr(model, f"feature_{name}")[:, : view.size] = torch.from_numpy(found)
    return model


def save(
    directory: Path,
    model: MVRec,
    data: Data,
    item_vectors: torch.Tensor,
    metrics: dict,
    users: Iterable[pa.Table] | None = None,
    reference: Reference | None = None,
) -> None:
    """Writes aside, the manifest last, then renames: a reader sees the whole directory or none.

    users: the users' histories, some at a time; None: those of data

    Raises CheckpointError when the directory exists.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: already exists, and a checkpoint is never overwritten")
    aside = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config = model.config
    if model.text is not None:
        model.text.save(aside / "text_encoder")
        text = config.model.text.model_copy(
            update={"path": "text_encoder", "tune": "frozen", "save": "whole", "compile": False}
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    without = {"serve": {"api_keys"}}  # a path, unless somebody has mistaken it for the key
    (aside / "config.json").write_text(config.model_dump_json(indent=1, exclude=without), encoding="utf-8")
    save_file(_weights(model), aside / "model.safetensors")
    (aside / "fitted.json").write_text(data.fitted.to_json(), encoding="utf-8")
    pq.write_table(data.catalog.table, aside / "items.parquet")
    np.save(aside / "item_vectors.npy", item_vectors.cpu().float().numpy())
    with pq.ParquetWriter(aside / "users.parquet", data.users.schema) as writer:
        for table in [data.users] if users is None else users:
            writer.write_table(table)
    (aside / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if reference is not None:
        reference.save(aside / "reference.json")
    seal(aside)
    aside.rename(directory)


def load(checkpoint: str | Path, device: str = "cpu") -> Checkpoint:
    """Verifies every hash and loads strictly; checkpoint: a directory, or its URI in an object store. Raises
    CheckpointError."""
    directory = local(checkpoint)
    manifest = verify(directory)
    tree = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if tree["model"]["text"]["path"] is not None:
        tree["model"]["text"]["path"] = str(directory / "text_encoder")
    try:
        config = parse_config(tree, str(directory / "config.json"))
        catalog = Catalog(pq.read_table(directory / "items.parquet"))
        data = Data(catalog, Fitted.load(directory / "fitted.json"), pq.read_table(directory / "users.parquet"))
        model = MVRec(config, catalog, data.fitted, torch.zeros(FIRST + len(catalog)))
        load_weights(model, load_file(directory / "model.safetensors"))
        reference = Reference.load(directory / "reference.json") if "reference.json" in manifest["files"] else None
    except (RuntimeError, KeyError, pa.ArrowInvalid) as error:
        raise CheckpointError(
            f"{directory}: does not fit this version of mvrec: {str(error).splitlines()[0]}"
        ) from None
    except MVRecError as error:
        raise CheckpointError(str(error)) from None
    vectors = torch.from_numpy(np.load(directory / "item_vectors.npy"))
    model = model.to(device).eval()
    return Checkpoint(config, model, data, vectors.to(device), manifest["model_version"], reference)


def load_weights(model: MVRec, weights: dict[str, torch.Tensor]) -> None:
    """Strictly: every weight but the text encoder's, and none besides. Raises RuntimeError."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith("text.encoder.")]
    if missing or unexpected:
        raise RuntimeError(f"weights missing: {missing}, unexpected: {unexpected}")


def _weights(model: MVRec) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value.contiguous() for name, value in state.items() if not name.startswith("text.encoder.")}
