from __future__ import annotations

import pyarrow as pa

from mvrec_core.catalog import FEW, FIRST, PAD, UNKNOWN, Catalog, Vocabulary


def test_known_unknown_and_missing_are_three_things():
    assert Vocabulary(["b", "流浪", "a"]).index(["a", "b", None, "x", "流浪"]).tolist() == [4, 2, PAD, UNKNOWN, 3]


def test_index_and_value_are_inverse():
    vocabulary = Vocabulary(["007", "7", "07"])
    assert [vocabulary.value(i) for i in vocabulary.index(["07", "007", "7"])] == ["07", "007", "7"]


def test_length_is_the_rows_of_an_embedding():
    assert len(Vocabulary(["a", "b"])) == FIRST + 2


def test_chunked_and_empty_values():
    vocabulary = Vocabulary(["a"])
    assert vocabulary.index(pa.chunked_array([["a"], [None, "b"]])).tolist() == [2, 0, 1]
    assert vocabulary.index([]).tolist() == []
    assert Vocabulary([]).index(["a", None]).tolist() == [UNKNOWN, PAD]


def test_a_catalogue_counts_items_only():
    catalog = Catalog(pa.table({"item_id": ["x", "y"], "display": ["X", None]}))
    assert (len(catalog), len(catalog.ids), catalog.display) == (2, 4, ["X", None])


def test_many_strings_are_found_as_a_few_are():
    vocabulary = Vocabulary([f"物{n}" for n in range(5000)])
    wanted = [None if n % 7 == 0 else f"物{n * 3}" for n in range(FEW + 1)]
    each = [int(vocabulary.index([one])[0]) for one in wanted]
    assert vocabulary.index(wanted).tolist() == vocabulary.index(pa.array(wanted)).tolist() == each
