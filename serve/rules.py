"""The file of rules, read again when it changes, and the log of what rules have withheld."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from mvrec_core.answers import Answer
from mvrec_core.errors import MVRecError, ResourceError
from mvrec_core.rules import Rules, load_rules
from serve.live_file import LiveFile


def rules_file(path: Path) -> LiveFile[Rules]:
    """Raises ConfigError where the file is wrong from the start: without rules nothing may be answered."""
    return LiveFile(str(path), lambda name: load_rules(Path(name)), report)


def report(error: MVRecError) -> None:
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
