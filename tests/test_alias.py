"""The file that says what is served, and the two commands that change it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mvrec_core.errors import CheckpointError, ConfigError, ResourceError
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Item, Request
from mvrec_core.sealed import seal, verify
from serve.alias import Alias, Release, main, publish, read_alias, roll_back
from serve.trial import try_out

ROOT = Path(__file__).parent.parent


def version(checkpoint):
    return verify(checkpoint)["model_version"]


def shares(alias):
    return {release.model_version: round(release.share, 6) for release in alias.live}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "商店.json"


@pytest.fixture
def third_checkpoint(plain_checkpoint, tmp_path):
    """The same model under another name: other metrics."""
    directory = shutil.copytree(plain_checkpoint, tmp_path / "third")
    (directory / "metrics.json").write_text('{"valid": {"NDCG@10": 1}}')
    (directory / "manifest.json").unlink()
    seal(directory)
    return directory


def test_publishing_replaces_and_a_rollback_brings_back(file, plain_checkpoint, other_checkpoint):
    a, b = version(plain_checkpoint), version(other_checkpoint)
    assert shares(publish(plain_checkpoint, file)) == {a: 1}
    assert shares(publish(other_checkpoint, file)) == {b: 1}
    assert shares(publish(plain_checkpoint, file, 0.1)) == {b: 0.9, a: 0.1}
    assert read_alias(file).name == "tiny" and read_alias(file).main.checkpoint == str(other_checkpoint)
    states = [shares(roll_back(file)) for _ in range(2)]
    assert states == [{b: 1}, {a: 1}] and shares(read_alias(file)) == {a: 1}
    with pytest.raises(ConfigError, match=r"商店.json: nothing was live before"):
        roll_back(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_shares_grow_and_leave_the_others_in_proportion(file, plain_checkpoint, other_checkpoint, third_checkpoint):
    a, b, c = map(version, (plain_checkpoint, other_checkpoint, third_checkpoint))
    publish(plain_checkpoint, file)
    assert shares(publish(other_checkpoint, file, 0.2)) == {a: 0.8, b: 0.2}
    assert shares(publish(other_checkpoint, file, 0.4)) == {a: 0.6, b: 0.4}
    assert shares(publish(third_checkpoint, file, 0.5)) == {a: 0.3, b: 0.2, c: 0.5}
    assert shares(publish(third_checkpoint, file)) == {c: 1}
    with pytest.raises(ConfigError, match="share: expected 1, since no other version is live, found 0.5"):
        publish(third_checkpoint, file, 0.5)


def test_what_is_bad_is_not_published(file, plain_checkpoint, broken_checkpoint, tmp_path):
    publish(plain_checkpoint, file)
    before = file.read_bytes()
    damaged = shutil.copytree(plain_checkpoint, tmp_path / "damaged")
    (damaged / "users.parquet").write_bytes(b"x")
    for checkpoint, reason in (
        (damaged, r"users.parquet: damaged: expected sha256"),
        (tmp_path / "none", "no such checkpoint directory"),
        (broken_checkpoint, "fails on sample requests: the model's scores are not numbers"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            publish(checkpoint, file)
        assert file.read_bytes() == before
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share: expected more than 0 and at most 1"):
            publish(plain_checkpoint, file, share)
    with pytest.raises(ConfigError, match="is the first to be written"):
        publish(plain_checkpoint, tmp_path / "new.json", 0.5)
    with pytest.raises(ResourceError, match="cannot write"):
        publish(plain_checkpoint, tmp_path / "no" / "folder.json")


RELEASE = {"checkpoint": "/a", "model_version": "x", "share": 1, "since": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "the file: "),
        (json.dumps({"name": "商店", "live": []}), "live: "),
        (json.dumps({"name": "商店", "live": [RELEASE | {"share": 2}]}), "live.0.share: "),
        (json.dumps({"name": "商店", "live": [RELEASE | {"share": 0.5}]}), "sum to 1, found 0.5"),
        (json.dumps({"name": "商店", "live": [RELEASE | {"share": 0.5}] * 2}), "a version is live twice"),
        (json.dumps({"name": "商店", "live": [RELEASE], "befor": []}), "befor: "),
    ],
)
def test_a_file_that_is_wrong_names_itself_and_the_key(file, text, message):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_alias(file)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_only_the_newest_states_are_kept():
    alias = Alias(name="a", live=(Release(checkpoint="/0", model_version="v0", share=1, since=0),))
    for n in range(1, 40):
        alias = alias.with_release(Release(checkpoint=f"/{n}", model_version=f"v{n}", share=1, since=n))
    assert len(alias.before) == 20 and alias.before[-1][0].model_version == "v38"


def test_the_commands(file, plain_checkpoint, capsys):
    where = ["--alias", str(file)]
    assert main(["publish", "--checkpoint", str(plain_checkpoint), *where]) == 0
    assert capsys.readouterr().out.startswith(f"{version(plain_checkpoint)}  100.0% of the users  /")
    assert main(["rollback", *where]) == 1
    assert capsys.readouterr().err == f"error: {file}: nothing was live before what is live now\n"
    verb = [sys.executable, "-m", "pipelines.cli", "rollback", *where]
    done = subprocess.run(verb, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, f"error: {file}: nothing was live before what is live now\n")


def test_a_version_has_to_give_what_the_old_one_gave(plain_recommender, broken_checkpoint, other_checkpoint):
    asked = [Request("u003", k=5), Request(k=39), Request("u003", k=1000)]
    try_out(Recommender.load(other_checkpoint), asked, plain_recommender)
    with pytest.raises(CheckpointError, match="not numbers"):
        try_out(Recommender.load(broken_checkpoint), asked, plain_recommender)
    smaller = plain_recommender.with_items([Item("i03"), Item("i04")], 1)
    with pytest.raises(CheckpointError, match="refuses a sample request: k: expected 1 to 38"):
        try_out(smaller, asked, plain_recommender)
    try_out(plain_recommender, asked, smaller)
