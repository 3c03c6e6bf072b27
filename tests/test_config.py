from __future__ import annotations

import pytest
import tiny
from pydantic import ValidationError

from mvrec_core.errors import ConfigError
from mvrec_core.reading import load_config, parse_config


def refused(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


SMALL = "name: a\ndata: {events: {path: e.csv}}\nviews: {id: {kind: id}}\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("modle.dim=8", "unknown key 'modle'; did you mean 'model'?"),
        ("model.text.tunes=full", "unknown key 'model.text.tunes'; did you mean 'tune'?"),
        ("data.events.colums={}", "unknown key 'data.events.colums'; did you mean 'columns'?"),
        ("views.id.sep=x", "unknown key 'views.id.sep'; valid names: kind, level"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path, override, message):
    assert refused(tmp_path, SMALL, override) == message


def test_the_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALL + "nmae: b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="run.yaml: unknown key 'nmae'; did you mean 'name'?"):
        load_config(path)


def test_a_wrong_type_shows_what_was_found(tmp_path):
    message = refused(tmp_path, SMALL, "train.epochs=many")
    assert message.startswith("key 'train.epochs': ") and message.endswith("found 'many'")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.epochs=0", "train.epochs"),
        ("model.dim=15", "dim 15 is not a multiple of heads 2"),
        ("train.loss=hinge", "found 'hinge'"),
        ("train.weights={view: id, values: {}}", "train.weights.view: expected a category view of events, found 'id'"),
        ("views.t={kind: text, columns: [title]}", "views.t reads columns of items, but data.items is not set"),
        ("views={r: {kind: number, level: event, column: rating}}", "views has none at item level"),
        ("views.x={column: a}", "key 'views.x' needs a 'kind'"),
        ("name=a/b", "key 'name'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path, override, part):
    assert part in refused(tmp_path, SMALL, override)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n"])
def test_what_is_no_tree_is_refused(tmp_path, text):
    assert refused(tmp_path, text)


def test_an_override_without_equals(tmp_path):
    assert "override 'train.epochs': expected section.key=value" in refused(tmp_path, SMALL, "train.epochs")


def test_overrides_are_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SMALL, encoding="utf-8")
    run = load_config(
        path,
        ["train.lr=1e-3", "evaluate.exclude_seen=false", "evaluate.baselines=[als]", "model.text.path=流浪", "seed=7"],
    )
    assert (run.train.lr, run.evaluate.exclude_seen, run.evaluate.baselines) == (0.001, False, ("als",))
    assert (run.model.text.path, run.seed, run.train.epochs) == ("流浪", 7, 30)


def test_a_run_is_frozen(plain_config):
    with pytest.raises(ValidationError, match="frozen"):
        plain_config.train.epochs = 3


def test_a_run_survives_json(plain_config):
    assert parse_config(plain_config.model_dump(mode="json"), "here") == plain_config


def test_views_by_level(plain_config):
    levels = {level: list(plain_config.views_at(level)) for level in ("item", "event", "user")}
    assert levels == {"item": ["id", "text", "genres", "year"], "event": ["rating", "time"], "user": ["gender"]}
    assert plain_config.text_view == "text"


def test_a_missing_file():
    with pytest.raises(ConfigError, match="no-such.yaml: no such configuration file"):
        load_config(tiny.CONFIG.with_name("no-such.yaml"))
