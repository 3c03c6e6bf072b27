"""An alias in an object store: what it says, or said when this machine last read it.

So replicas also start while the store does not answer: the releases that they need are kept by this machine too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from mvrec_core import places
from mvrec_core.errors import ResourceError
from mvrec_core.releases import kept_folder
from serve.alias import Alias, read_alias


def last_known(file: str) -> Alias:
    """As `read_alias`; where its store does not answer, what is kept here, if anything is, which is logged."""
    try:
        alias = read_alias(file)
    except ResourceError as error:
        if not is_known(file):
            raise
        logging.getLogger("ray.serve").error("%s; going on with what it said when this machine last read it", error)
        return read_alias(_kept(file))
    if places.is_uri(file):
        kept = _kept(file)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        aside.write_text(alias.model_dump_json(), encoding="utf-8")
        aside.replace(kept)
    return alias


def is_known(file: str) -> bool:
    """Whether an alias of an object store has been read on this machine."""
    return places.is_uri(file) and _kept(file).is_file()


def _kept(file: str) -> Path:
    return kept_folder("aliases") / f"{hashlib.sha256(file.encode()).hexdigest()}.json"
