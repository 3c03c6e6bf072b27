"""The lists of all users: those of the Recommender, a block at a time, and a run that was stopped goes on."""

from __future__ import annotations

import json
import time

import pyarrow.parquet as pq
import pytest
import tiny

from mvrec_core.errors import CheckpointError, RequestError
from mvrec_core.requests import Request
from pipelines.recommend import recommend

K = 7


class Stopped(Exception):
    """Ctrl-C, so to say."""


def stopping(at: str):
    def log(line: str) -> None:
        if at in line:
            raise Stopped

    return log


def quiet(line):
    pass


@pytest.fixture
def out(tmp_path):
    return tmp_path / "列表.parquet"


def left(out):
    return sorted(path.name for path in out.parent.iterdir())


@pytest.mark.parametrize("stage", ["test", "live"])
def test_one_block_needs_no_ray(plain_checkpoint, plain_recommender, out, stage):
    rows = recommend(plain_checkpoint, stage, K, out, quiet)
    assert pq.read_table(out).equals(plain_recommender.stored.lists(stage, K))
    assert rows == K * (tiny.USERS if stage == "test" else tiny.USERS + len(tiny.SHORT) + 2)
    assert left(out) == [out.name]


def test_live_lists_are_as_of_when_they_will_be_read(plain_checkpoint, plain_recommender, out):
    now = 1_700_000_000
    recommend(plain_checkpoint, "live", K, out, quiet, now=now * 1_000_000)
    found = pq.read_table(out)
    assert found != plain_recommender.stored.lists("live", K)
    users = found["user_id"].unique().to_pylist()[:9]
    answers = plain_recommender.recommend([Request(user, k=K, now=float(now)) for user in users])
    assert found["item_id"].to_pylist()[: 9 * K] == [item.item_id for answer in answers for item in answer.items]


@pytest.mark.ray
def test_blocks_on_actors_give_the_same_lists(ray_local, plain_checkpoint, plain_recommender, out):
    lines = []
    recommend(plain_checkpoint, "test", K, out, lines.append, users=32)
    assert pq.read_table(out).equals(plain_recommender.stored.lists("test", K))
    assert lines[-2] == "recommend: 4/4 blocks of 32 users" and left(out) == [out.name]


@pytest.mark.ray
def test_a_run_that_was_stopped_goes_on(ray_local, plain_checkpoint, plain_recommender, out):
    with pytest.raises(Stopped):
        recommend(plain_checkpoint, "live", K, out, stopping("1/4"), users=32)
    assert left(out) == [f"{out.name}.parts"]  # the file is not there before it is whole
    there = len(list(out.parent.glob("*.parts/part-*.parquet")))
    lines = []
    recommend(plain_checkpoint, "live", K, out, lines.append, users=32)
    assert there >= 1 and lines[0].startswith("recommend: going on from ")
    assert 1 <= len(lines) - 1 <= 4 - there + 1  # an actor may have ended another block meanwhile
    assert pq.read_table(out).equals(plain_recommender.stored.lists("live", K))


@pytest.mark.ray
def test_what_goes_on_is_as_of_when_it_began(ray_local, plain_checkpoint, plain_recommender, out):
    before = time.time_ns() // 1000
    with pytest.raises(Stopped):
        recommend(plain_checkpoint, "live", K, out, stopping("1/4"), users=32, now="clock")
    began = json.loads(out.with_name(f"{out.name}.parts").joinpath("of.json").read_text())["began"]
    assert before <= began <= time.time_ns() // 1000
    recommend(plain_checkpoint, "live", K, out, quiet, users=32, now="clock")
    assert pq.read_table(out).equals(plain_recommender.stored.lists("live", K, now=began))


def test_parts_of_other_lists_are_not_gone_on_with(plain_checkpoint, plain_recommender, out):
    with pytest.raises(Stopped):
        recommend(plain_checkpoint, "live", K, out, stopping("1/1"))
    lines = []
    recommend(plain_checkpoint, "live", K - 1, out, lines.append)
    assert not any("going on" in line for line in lines)
    assert pq.read_table(out).equals(plain_recommender.stored.lists("live", K - 1))


def test_a_bad_k_is_one_error_and_leaves_nothing(plain_checkpoint, out):
    with pytest.raises(RequestError, match=f"k: expected 1 to {tiny.ITEMS}"):
        recommend(plain_checkpoint, "live", tiny.ITEMS + 1, out, quiet)
    assert left(out) == []


@pytest.mark.ray
def test_a_bad_k_on_actors_is_the_same_error(ray_local, plain_checkpoint, out):
    with pytest.raises(RequestError, match=f"k: expected 1 to {tiny.ITEMS}"):
        recommend(plain_checkpoint, "live", tiny.ITEMS + 1, out, quiet, users=32)


def test_no_checkpoint(tmp_path, out):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        recommend(tmp_path / "none", "live", K, out, quiet)
