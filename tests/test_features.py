from __future__ import annotations

import numpy as np
import pyarrow as pa

from mvrec_core.catalog import Vocabulary
from mvrec_core.features import MAX_VALUES, MISSING_TIME, Fitted
from mvrec_core.views import CategoryView, NumberView, TimeView

FITTED = Fitted({"genre": Vocabulary(["a", "科幻"])}, {"price": (10.0, 4.0), "flat": (3.0, 0.0)})
GENRE = CategoryView(kind="category", level="item", column="genre")
PRICE = NumberView(kind="number", level="item", column="price")


def test_categories_are_padded():
    values = pa.array([["科幻", "a", "new"], None, [], ["a"]], pa.list_(pa.string()))
    assert FITTED.encode("genre", GENRE, values).tolist() == [[3, 2, 1], [0, 0, 0], [0, 0, 0], [2, 0, 0]]


def test_categories_with_no_value_anywhere_keep_a_column():
    assert FITTED.encode("genre", GENRE, pa.array([None, []], pa.list_(pa.string()))).tolist() == [[0], [0]]


def test_too_many_categories_are_cut():
    values = pa.array([["a"] * (MAX_VALUES + 5), ["科幻"]], pa.list_(pa.string()))
    encoded = FITTED.encode("genre", GENRE, values)
    assert encoded.shape == (2, MAX_VALUES) and encoded[0].tolist() == [2] * MAX_VALUES
    assert encoded[1].tolist() == [3] + [0] * (MAX_VALUES - 1)


def test_a_slice_of_lists_is_read_as_it_is():
    values = pa.array([["a"], ["科幻"], ["a", "科幻"]], pa.list_(pa.string())).slice(1)
    assert FITTED.encode("genre", GENRE, values).tolist() == [[3, 0], [2, 3]]


def test_numbers_are_standardised_and_missing_stays_missing():
    encoded = FITTED.encode("price", PRICE, pa.array([10.0, None, 2.0]))
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(encoded, np.array([0.0, np.nan, -2.0], np.float32))


def test_a_number_that_never_varied_is_only_centred():
    assert FITTED.encode("flat", PRICE, pa.array([3, 5])).tolist() == [0.0, 2.0]


def test_times_are_kept():
    values = pa.chunked_array([[5, None]], pa.int64())
    assert FITTED.encode("time", TimeView(kind="time"), values).tolist() == [5, MISSING_TIME]


def test_json_round_trip(tmp_path):
    (tmp_path / "fitted.json").write_text(FITTED.to_json(), encoding="utf-8")
    again = Fitted.load(tmp_path / "fitted.json")
    assert again.scales == FITTED.scales
    assert again.vocabularies["genre"].values.to_pylist() == ["a", "科幻"]
