"""The directory that pretraining leaves: weights, the views that they are of, and the losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mvrec_core import checkpoint, sealed
from mvrec_core.checkpoint import Data
from mvrec_core.config import Config
from mvrec_core.errors import CheckpointError
from mvrec_core.model import MVRec
from mvrec_core.sequences import VALID
from mvrec_core.shards import Shards


def load(directory: Path, config: Config, data: Data, shards: Shards, before: int = VALID) -> MVRec:
    """As checkpoint.new_model, but with the pretrained weights.

    Raises CheckpointError where there are none, a file is damaged, or the views, their values or the sizes of the
    model are not those that were pretrained.
    """
    if not directory.exists():
        raise CheckpointError(
            f"{directory}: nothing is pretrained; run 'mvrec pretrain' first, or set train.init=scratch"
        )
    sealed.verify(directory)
    _check_views(directory, json.loads((directory / "views.json").read_text(encoding="utf-8")), _views(config, data))
    if (directory / "text_encoder").exists():
        config = reading(config, directory / "text_encoder")
    model = checkpoint.new_model(config, data, shards, before)
    here, found = _weights(model), load_file(directory / "model.safetensors")
    for name in sorted(here.keys() | found.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (here, found)]
        if shapes[0] != shapes[1]:
            view = name.split(".")[1] if name.startswith("encoders.") else None
            raise _misfit(directory, f"{f'view {view!r}: ' if view else ''}{name}", *shapes)
    with torch.no_grad():
        for name, weight in here.items():
            weight.copy_(found[name])
    return model


def save(
    directory: Path,
    config: Config,
    data: Data,
    model: MVRec,
    losses: dict[str, list[dict[str, float]]],
    with_text: bool,
) -> None:
    directory.mkdir(parents=True)
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in _weights(model).items()}, directory / "model.safetensors"
    )
    if model.text is not None and (with_text or model.text.tuned):
        model.text.save(directory / "text_encoder")
    (directory / "config.json").write_text(config.model_dump_json(indent=1), encoding="utf-8")
    for name, tree in (("views", _views(config, data)), ("losses", losses)):
        (directory / f"{name}.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
    sealed.seal(directory)


def _weights(model: MVRec) -> dict[str, nn.Parameter]:
    """What pretraining moves, but for the text encoder: tau and b only turn a cosine into a chance of coming next."""
    left = ("text.", "log_tau", "bias")
    return {name: p for name, p in model.named_parameters() if not name.startswith(left)}


def _views(config: Config, data: Data) -> dict[str, dict[str, Any]]:
    """Of each view its configuration, and a digest of what its indices or its scale mean."""
    means: dict[str, Callable[[str], Any]] = {
        "id": lambda name: data.catalog.ids.values.to_pylist(),
        "text": lambda name: str(config.model.text.path),
        "category": lambda name: data.fitted.vocabularies[name].values.to_pylist(),
        "number": lambda name: data.fitted.scales[name],
    }
    found = {}
    for name, view in config.views.items():
        meant = json.dumps(means[view.kind](name) if view.kind in means else None, ensure_ascii=False)
        found[name] = {**view.model_dump(mode="json"), "values": hashlib.sha256(meant.encode()).hexdigest()[:12]}
    return found


def _check_views(directory: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in [*expected, *found]:
        one, other = expected.get(name), found.get(name)
        if one is None or other is None:
            raise _misfit(directory, f"view '{name}'", "a view" if one else None, "a view" if other else None)
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                raise _misfit(directory, f"view '{name}': {key}", one.get(key), other.get(key))
    if list(expected) != list(found):
        raise _misfit(directory, "order of the views", list(expected), list(found))


def _misfit(directory: Path, what: str, expected: Any, found: Any) -> CheckpointError:
    nothing = "nothing"
    return CheckpointError(
        f"{directory}: {what}: expected {nothing if expected is None else expected}, "
        f"found {nothing if found is None else found}; run 'mvrec pretrain --overwrite' with this configuration"
    )


def reading(config: Config, path: Path) -> Config:
    """The configuration with another text encoder to start from."""
    text = config.model.text.model_copy(update={"path": str(path)})
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
