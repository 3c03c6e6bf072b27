from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import tiny

from mvrec_core.attributes import Attributes, Between, OneOf, Values
from mvrec_core.errors import RequestError

ROWS = tiny.item_rows()


@pytest.fixture
def attributes(plain_config, plain_data) -> Attributes:
    return Attributes.of(plain_config, plain_data.catalog.table)


def passing(attributes, condition) -> list[str]:
    return [f"i{row - 2:02d}" for row in attributes.mask(condition).nonzero().flatten().tolist() if row >= 2]


def having(rule) -> list[str]:
    return [row["item_id"] for row in ROWS if rule(set(filter(None, row["genres"].split("|"))), row["year"])]


@pytest.mark.parametrize(
    ("any_of", "none_of"),
    [
        (None, set()),
        ({"科幻"}, set()),
        ({"科幻", "Drama"}, {"Comedy"}),
        (None, {"Action"}),
        ({"Western"}, set()),
        (set(), set()),
        ({"Drama"}, {"Western", "Drama"}),
    ],
)
def test_categories_are_those_of_the_data(attributes, any_of, none_of):
    condition = OneOf("genres", None if any_of is None else frozenset(any_of), frozenset(none_of))
    wanted = having(lambda genres, _: (any_of is None or genres & any_of) and not genres & none_of)
    assert passing(attributes, condition) == wanted


@pytest.mark.parametrize(("low", "high"), [(None, None), (1990, 1999), (2015.5, None), (None, 1980), (3000, 4000)])
def test_numbers_are_in_the_units_of_the_data_and_a_missing_one_never_passes(attributes, low, high):
    inside = having(lambda _, year: year and (low or 0) <= float(year) <= (high or 9999))
    assert passing(attributes, Between("year", low, high)) == inside
    assert tiny.NO_YEAR not in inside


def test_a_mask_is_made_once(attributes):
    first = attributes.mask(OneOf("genres", frozenset({"Drama", "科幻"})))
    assert attributes.mask(OneOf("genres", frozenset(["科幻", "Drama"]))) is first


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (OneOf("genre"), "filter.categories.genre: not a category view of items; did you mean 'genres'?"),
        (OneOf("gender"), "filter.categories.gender: not a category view of items; did you mean 'genres'?"),
        (OneOf("rating"), "filter.categories.rating: not a category view of items; valid names: genres"),
        (Between("jear"), "filter.ranges.jear: not a number view of items; did you mean 'year'?"),
        (Between("genres"), "filter.ranges.genres: not a number view of items; valid names: year"),
    ],
)
def test_an_unknown_view_names_the_nearest(attributes, condition, message):
    with pytest.raises(RequestError) as error:
        attributes.check([OneOf("genres"), condition])
    assert (str(error.value), error.value.field) == (message, message.partition(":")[0])


def test_values_of_rows():
    values = Values.of(pa.array([["a", "b"], None, [], ["b", "b"]], pa.list_(pa.string())))
    assert values.of_rows(np.array([3, 1, 0])).tolist() == [[2, 2], [0, 0], [1, 2]]
    assert values.of_rows(np.zeros(0, np.int64)).shape[0] == 0


def test_no_values_at_all():
    values = Values.of(pa.nulls(2, pa.list_(pa.string())))
    assert values.having(frozenset({"a"})).tolist() == [False, False]
    assert values.of_rows(np.arange(2)).tolist() == [
        [0],
        [0],
    ]
