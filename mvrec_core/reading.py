"""How a Config is read: YAML, `section.key=value` overrides, and one sentence for what is wrong in them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import ValidationError

from mvrec_core.config import Config
from mvrec_core.errors import ConfigError, nearest
from mvrec_core.node import Node


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file with `section.key=value` overrides; values are YAML too.

    Raises ConfigError naming the file, the key and the nearest valid name.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'data:' and 'views:', found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """A Config from plain values; `origin` is what an error calls the source."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error, tree)}") from None


def changed(config: Config, values: Mapping[str, Any], origin: str) -> Config:
    """The configuration with other values of some "section.key"s; `origin` is what an error calls the source.

    Raises ConfigError.
    """
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        _put(tree, key, value, origin)
    return parse_config(tree, origin)


def check_value(config: Config, key: str, value: Any, origin: str) -> None:
    """Raises ConfigError where there is no such "section.key", or it can never have the value. Whether the value goes
    with the others is not asked."""
    tree = config.model_dump(mode="json")
    _put(tree, key, value, origin)
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        if error.errors()[0]["type"] != "value_error":  # this one is of several keys
            raise ConfigError(f"{origin}: {_explain(error, tree)}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None
    if isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            value = text
    _put(tree, key, value, f"override '{override}'")


def _put(tree: dict[str, Any], key: str, value: Any, origin: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if isinstance(tree, list) and len(tree) == 1:  # the only source of data.events
            tree = tree[0]
        if not isinstance(tree, dict):
            raise ConfigError(f"{origin}: '{section}' is a value, not a section")
    tree[last] = value


UNION_BRANCHES = ("str", "tuple[str, ...]")  # of Source.path


def _explain(error: ValidationError, tree: dict[str, Any]) -> str:
    first = error.errors()[0]
    loc = first["loc"]
    if loc[:2] == ("data", "events") and isinstance(tree["data"]["events"], dict):
        loc = loc[:2] + loc[3:]  # one source was given, not a list of them
    in_union = loc[:1] == ("views",) or loc[:2] == ("data", "split")  # there pydantic adds the union's tag
    tagged = 2 if in_union else 3 if loc[:2] == ("tune", "space") else None
    where = [str(part) for place, part in enumerate(loc) if place != tagged and str(part) not in UNION_BRANCHES]
    key = ".".join(where)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(where[-1], _valid_keys(where[:-1], loc))}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{first['ctx']['error']}"
    if first["type"] == "union_tag_not_found":
        return f"key '{key}' needs a 'kind'"
    return f"key '{key}': {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}"


def _valid_keys(where: list[str], loc: tuple[Any, ...]) -> set[str]:
    """The keys that the branch at `where` of the tree takes."""
    branches: list[Any] = [Config]
    for part in (part for part in where if not part.isdigit()):  # a place in a list is no key
        below: list[Any] = []
        for branch in branches:
            below += _models(branch.model_fields[part].annotation) if part in branch.model_fields else [branch]
        branches = below
    tagged = [
        b
        for b in branches
        if "kind" in b.model_fields and set(typing.get_args(b.model_fields["kind"].annotation)) & set(loc)
    ]
    return {name for branch in tagged or branches for name in branch.model_fields}


def _models(annotation: Any) -> list[type[Node]]:
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated, dict, tuple):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []
