"""The file of rules, read again when it changes, and the log of what rules have withheld."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from mvrec_core.errors import ConfigError, ResourceError
from mvrec_core.recommender import Answer
from mvrec_core.rules import Rules, load_rules

LOOK_EVERY_S = 1.0


class RulesFile:
    """Raises ConfigError where the file is wrong from the start: without rules nothing may be answered."""

    def __init__(self, path: Path):
        self.path = path
        self.rules = load_rules(path)
        self._stamp = self._now()
        self._looked = time.monotonic()

    def read(self) -> Rules:
        """The rules as of now, or of a second ago. Where the file has become wrong they stay as they were, and the log
        says so once."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self.rules = load_rules(self.path)
                except ConfigError as error:
                    report(error)
        return self.rules

    def _now(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def report(error: ConfigError) -> None:
    """In the log: rules that cannot be followed."""
    logging.getLogger("ray.serve").error("the rules stay as they were: %s", error)


class AuditLog:
    """Lines of JSON, at the end of a file that others may move away: time, model_version, item_id, why. They do not say
    whose list it was."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise ResourceError(f"cannot write what rules withhold to {path}: {error}; set serve.audit") from None

    def write(self, answer: Answer, model_version: str) -> None:
        if not answer.withheld:
            return
        stamp = {"time": round(time.time(), 3), "model_version": model_version}
        lines = [stamp | {"item_id": one.item_id, "why": one.why} for one in answer.withheld]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            logging.getLogger("ray.serve").error("cannot write what rules withheld to %s: %s", self.path, error)
