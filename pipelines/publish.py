"""A finished directory under its final name: a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def publish(aside: Path, target: Path) -> None:
    """Renames `aside`, which must stand beside `target`; an older target steps aside first and is deleted last."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
