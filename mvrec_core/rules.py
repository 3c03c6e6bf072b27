"""What must not be recommended to anybody, and why: a YAML file that people write while the service runs.

    block:
      - why: recalled by the maker
        items: ["1042", "1043"]
      - why: not for this shop
        categories: {genres: [Horror, 恐怖]}
        ranges: {year: {max: 1950}}

An item is withheld where a rule names it, one of its values or a range that its number is in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from mvrec_core.attributes import Between, Condition, OneOf
from mvrec_core.data import Range
from mvrec_core.errors import ConfigError, nearest
from mvrec_core.node import Node


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text)]


class Rule(Node):
    """One reason, and what it is about."""

    why: str = Field(min_length=1)
    items: tuple[Text, ...] = ()
    categories: dict[str, tuple[Text, ...]] = {}  # by category view of items
    ranges: dict[str, Range] = {}  # by number view of items

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Any of which is enough."""
        values = [OneOf(view, frozenset(values)) for view, values in self.categories.items()]
        return (*values, *(Between(view, span.min, span.max) for view, span in self.ranges.items()))


class Rules(Node):
    block: tuple[Rule, ...] = ()


def load_rules(path: Path) -> Rules:
    """Raises ConfigError, which names the file and the key."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Rules.model_validate({} if tree is None else tree)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    if first["type"] == "extra_forbidden":
        valid = {1: Rules.model_fields, 3: Rule.model_fields}.get(len(where), Range.model_fields)
        return f"unknown key '{key}'; {nearest(where[-1], valid)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    return f"{key or 'the file'}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r:.60}"
