"""How a checkpoint is served: what its config.json says, with what the command line or a deploy file changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mvrec_core.config import Config, ServeConfig
from mvrec_core.errors import CheckpointError, ConfigError
from mvrec_core.reading import parse_config
from mvrec_core.releases import local


def serve_settings(checkpoint: str | Path, changes: dict[str, Any]) -> ServeConfig:
    """The "serve" section of the checkpoint's config.json; of `changes` those that are not None come on top.

    Raises CheckpointError where the directory is not a checkpoint, ConfigError where a value cannot be.
    """
    saved = checkpoint_config(local(checkpoint)).serve
    return _changed(saved, {name: value for name, value in changes.items() if value is not None})


def checkpoint_config(checkpoint: Path) -> Config:
    """Raises CheckpointError where the directory is not a checkpoint."""
    config_file = _checked(checkpoint) / "config.json"
    try:
        tree = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: the checkpoint lacks its file config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file}: cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{config_file}: expected a JSON object, found {type(tree).__name__}")
    return parse_config(tree, str(config_file))


def _checked(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint directory")
    if not (checkpoint / "manifest.json").is_file():
        raise CheckpointError(f"{checkpoint}: not a checkpoint: it has no manifest.json")
    return checkpoint


def _changed(saved: ServeConfig, changes: dict[str, Any]) -> ServeConfig:
    try:
        settings = ServeConfig.model_validate({**saved.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg'].lower()}, found {first['input']!r}") from None
    if settings.max_replicas < settings.min_replicas:
        if "max_replicas" in changes:
            raise ConfigError(f"max_replicas {settings.max_replicas} is below min_replicas {settings.min_replicas}")
        settings = settings.model_copy(update={"max_replicas": settings.min_replicas})
    return settings
