from __future__ import annotations

import pytest
import tiny

from mvrec_core.answers import Withheld
from mvrec_core.errors import ConfigError
from mvrec_core.requests import Item, Request
from mvrec_core.rules import Rule, Rules, load_rules

TEXT = """
block:
  - why: recalled
    items: [i03, "i04", 7, gone]
  - why: 不合适
    categories: {genres: [科幻]}
    ranges: {year: {max: 1982}}
"""


def ids(answer):
    return [item.item_id for item in answer.items]


def write(folder, text):
    (folder / "rules.yaml").write_text(text, encoding="utf-8")
    return folder / "rules.yaml"


def test_a_file_of_rules(tmp_path):
    recalled, other = load_rules(write(tmp_path, TEXT)).block
    assert recalled == Rule(why="recalled", items=("i03", "i04", "7", "gone"))
    assert (other.why, len(other.conditions)) == ("不合适", 2)
    assert load_rules(write(tmp_path, "")) == Rules()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block: [", "not valid YAML"),
        ("blok: []", "unknown key 'blok'; did you mean 'block'?"),
        ("block: [{items: [a]}]", "key 'block.0.why' is missing"),
        ("block: [{why: x, item: [a]}]", "unknown key 'block.0.item'; did you mean 'items'?"),
        ("block: [{why: x, items: a}]", "block.0.items: input should be a valid tuple, found 'a'"),
        ("- a", "the file: "),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_rules(write(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path / 'rules.yaml'}: ") and message in str(error.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rules(tmp_path / "none.yaml")


@pytest.mark.parametrize("user", ["u003", None])
def test_what_is_blocked_never_comes_and_k_come_instead(plain_recommender, tmp_path, user):
    ruled = plain_recommender.with_rules(load_rules(write(tmp_path, TEXT)))
    rows = tiny.item_rows()
    blocked = {"i00", "i01", "i02", "i03", "i04"} | {row["item_id"] for row in rows if "科幻" in row["genres"]}
    everything = ids(plain_recommender.recommend([Request(user, k=40)])[0])
    answer = ruled.recommend([Request(user, k=8)])[0]
    assert ids(answer) == [item for item in everything if item not in blocked][:8]
    before = everything[: everything.index(ids(answer)[-1])]
    assert [one.item_id for one in answer.withheld] == [item for item in before if item in blocked][:20]
    assert {one.why for one in answer.withheld} <= {"recalled", "不合适"}
    assert not blocked & {item.item_id for item in ruled.similar("i07", Request(k=20))}
    assert plain_recommender.recommend([Request(user, k=8)])[0].withheld == ()


def test_what_a_request_does_not_want_is_not_called_withheld(plain_recommender):
    ruled = plain_recommender.with_rules(Rules(block=(Rule(why="x", items=("i30", "i31")),)))
    answer = ruled.recommend([Request("u003", k=40, allow=frozenset({"i30", "i32"}))])[0]
    assert ids(answer) == ["i32"] and answer.withheld == (Withheld("i30", "x"),)


def test_a_rule_meets_items_that_come_later(plain_recommender):
    ruled = plain_recommender.with_rules(
        Rules(block=(Rule(why="x", items=("i98",), categories={"genres": ("恐怖",)}),))
    )
    later = ruled.with_items([Item("i98", {}), Item("i99", {"genres": ["恐怖"]})], 1)
    assert ids(later.recommend([Request(None, allow=frozenset({"i98", "i99"}))])[0]) == []


def test_a_rule_on_no_view_names_the_nearest(plain_recommender):
    with pytest.raises(ConfigError, match=r"block.0.categories.genre: not a category view .* did you mean 'genres'"):
        plain_recommender.with_rules(Rules(block=(Rule(why="x", categories={"genre": ("a",)}),)))
