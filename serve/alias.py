"""An alias: a small file that says which checkpoints are live, for which share of the users, and which were before.

    {"name": "shop",
     "live": [{"checkpoint": "/data/releases/2026-11-26", "model_version": "0f5b1aca7c68", "share": 1.0, "since": ...}],
     "before": [[{"checkpoint": "/data/releases/2026-11-19", ...}]]}

`python -m serve.alias publish` and `rollback` replace it as a whole, and replicas read it again when it changes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileType
from pydantic import Field, ValidationError, model_validator

from mvrec_core import places
from mvrec_core.errors import ConfigError, MVRecError, ResourceError, first_line
from mvrec_core.node import Node
from mvrec_core.recommender import Recommender
from mvrec_core.releases import local, send
from serve.trial import try_out

REMEMBERED = 20  # states to go back to


class Release(Node):
    """A published checkpoint."""

    checkpoint: str
    model_version: str
    share: float = Field(gt=0, le=1)  # of the users
    since: float  # Unix seconds: when it was given this share


Live = tuple[Release, ...]


class Alias(Node):
    name: str  # of the first run that was published: what live events and items are kept under, whatever follows it
    live: Live = Field(min_length=1)  # the oldest first
    before: tuple[Live, ...] = ()  # the newest last

    @model_validator(mode="after")
    def _shares_are_whole(self) -> Alias:
        for live in (self.live, *self.before):
            if not math.isclose(total := sum(release.share for release in live), 1, abs_tol=1e-6):
                raise ValueError(f"the shares of versions that are live together have to sum to 1, found {total:g}")
            if len({release.model_version for release in live}) < len(live):
                raise ValueError("a version is live twice")
        return self

    @property
    def main(self) -> Release:
        """The version of the most users."""
        return max(self.live, key=lambda release: release.share)

    def with_release(self, new: Release) -> Alias:
        """The new one gets its share, the others what is left in proportion; one of share 1 replaces them."""
        others = [release for release in self.live if release.model_version != new.model_version]
        if new.share == 1:
            return self._next((new,))
        if not others:
            raise ConfigError(f"share: expected 1, since no other version is live, found {new.share:g}")
        left = (1 - new.share) / sum(release.share for release in others)
        return self._next((*(one.model_copy(update={"share": one.share * left}) for one in others), new))

    def _next(self, live: Live) -> Alias:
        return Alias(name=self.name, live=live, before=(*self.before, self.live)[-REMEMBERED:])

    def rolled_back(self) -> Alias:
        """What was live before the last publishing. Raises ConfigError where nothing was."""
        if not self.before:
            raise ConfigError("nothing was live before what is live now")
        return Alias(name=self.name, live=self.before[-1], before=self.before[:-1])


def read_alias(file: str | Path) -> Alias:
    """file: or a URI in an object store. Raises ConfigError, which names the file and the key, and ResourceError where
    the file is there, perhaps, but cannot be reached."""
    try:
        return Alias.model_validate(json.loads(places.read(str(file)).decode()))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such alias file; 'mvrec publish' writes one") from None
    except OSError as error:
        raise ResourceError(f"{file}: cannot be read: {first_line(error)}") from None
    except (UnicodeDecodeError, ArrowException) as error:
        raise ConfigError(f"{file}: cannot be read: {first_line(error)}") from None
    except ValidationError as error:  # which is a ValueError, as JSON's error is
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None


def publish(checkpoint: str | Path, file: str | Path, share: float = 1.0, to: str | None = None) -> Alias:
    """Makes a checkpoint live, once it has been loaded strictly and tried out.

    checkpoint, file, to: on this machine, or URIs in an object store
    to: a folder to copy it to first, so that it does not change under those who serve it

    Raises CheckpointError, ConfigError or ResourceError, and then has changed nothing.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share: expected more than 0 and at most 1, found {share:g}")
    before = read_alias(file) if _exists(file) else None
    if before is None and share < 1:
        raise ConfigError(f"share: expected 1, since {file} is the first to be written, found {share:g}")
    recommender = Recommender.load(checkpoint)
    try_out(recommender)
    if to is not None:
        checkpoint = send(local(checkpoint), to)
    new = Release(
        checkpoint=str(checkpoint) if places.is_uri(str(checkpoint)) else str(Path(checkpoint).resolve()),
        model_version=recommender.model_version,
        share=share,
        since=round(time.time(), 3),
    )
    alias = Alias(name=recommender.config.name, live=(new,)) if before is None else before.with_release(new)
    _write(alias, file)
    return alias


def roll_back(file: str | Path) -> Alias:
    """Makes live what was before the last publishing. Raises ConfigError or ResourceError."""
    before = read_alias(file)
    try:
        alias = before.rolled_back()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    _write(alias, file)
    return alias


def _exists(file: str | Path) -> bool:
    try:
        return places.kind(str(file)) != FileType.NotFound
    except (OSError, ArrowException) as error:
        raise ConfigError(f"{file}: cannot be read: {first_line(error)}") from None


def _write(alias: Alias, file: str | Path) -> None:
    """Whole or not at all."""
    text = alias.model_dump_json(indent=1) + "\n"
    if places.is_uri(str(file)):
        try:
            places.write(str(file), text.encode())
        except OSError as error:
            raise ResourceError(f"cannot write {file}: {first_line(error)}") from None
        return
    file = Path(file)
    aside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {file}: {error.strerror or error}") from None


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 with one line on stderr after a mistake."""
    parser = argparse.ArgumentParser(prog="mvrec", description="Change what `mvrec serve --alias FILE` serves.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    publishing = verbs.add_parser("publish", help="make a checkpoint live")
    publishing.add_argument("--checkpoint", required=True, metavar="DIR", help="or its URI, such as s3://bucket/key")
    publishing.add_argument("--alias", required=True, metavar="FILE", help="or a URI")
    publishing.add_argument("--to", metavar="DIR", help="a folder or a URI to copy it to first, as DIR/<version>")
    publishing.add_argument("--share", default=1.0, metavar="X", type=float, help="of the users, 1 if not given")
    rolling = verbs.add_parser("rollback", help="make live what was before")
    rolling.add_argument("--alias", required=True, metavar="FILE", help="or a URI")
    given = parser.parse_args(argv)
    try:
        if given.verb == "publish":
            alias = publish(given.checkpoint, given.alias, given.share, given.to)
        else:
            alias = roll_back(given.alias)
    except MVRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for release in alias.live:
        print(f"{release.model_version}  {release.share:.1%} of the users  {release.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
