"""The settings of a service: those of its checkpoint, and what changes them."""

from __future__ import annotations

import pytest

from mvrec_core.errors import CheckpointError, ConfigError
from serve.settings import serve_settings


def test_settings_come_from_the_checkpoint_and_are_changed_by_what_is_given(plain_checkpoint):
    saved = serve_settings(plain_checkpoint, {"port": None})
    changed = serve_settings(plain_checkpoint, {"port": 9000, "min_replicas": saved.max_replicas + 1})
    assert (changed.port, changed.host) == (9000, saved.host)
    assert changed.max_replicas == changed.min_replicas == saved.max_replicas + 1
    with pytest.raises(ConfigError, match="max_batch_size"):
        serve_settings(plain_checkpoint, {"max_batch_size": 0})
    with pytest.raises(ConfigError, match="max_replicas 1 is below min_replicas 2"):
        serve_settings(plain_checkpoint, {"min_replicas": 2, "max_replicas": 1})


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        serve_settings(tmp_path / "none", {})
    with pytest.raises(CheckpointError, match="it has no manifest.json"):
        serve_settings(tmp_path, {})
