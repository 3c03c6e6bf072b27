"""Vectors of items, from raw files to an answer."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from mvrec_core import checkpoint, ranking, training
from mvrec_core.catalog import FIRST, Catalog
from mvrec_core.checkpoint import Data
from mvrec_core.errors import ConfigError, DataError, RequestError
from mvrec_core.features import Fitted
from mvrec_core.reading import parse_config
from mvrec_core.recommender import Candidate, Recommender, Request
from mvrec_core.shards import Shards
from mvrec_core.views import VectorView
from mvrec_core.workers import Workers
from pipelines import catalogue, tables, vectors
from pipelines.buckets import fit, sums
from pipelines.recommend import recommend
from pipelines.train import train

IMAGE = {"kind": "vector", "column": "image"}
ROWS: list[tuple[str, list[float] | None]] = [("a", [1.0, 0.1, -3e-5]), ("b", None), ("电", [0.0, 2.5, 7.0])]
BLANK = "item_id,image\n"


def write(path, rows=ROWS, kind: str = "list", key: str = "item_id"):
    """The rows as a file; kind: of the column in Parquet, or how a text file writes it."""
    ids, values = [item for item, _ in rows], [value for _, value in rows]
    if path.suffix == ".parquet":
        number = pa.float64() if kind == "double" else pa.float32()
        size = len(next(value for value in values if value))
        shape = (
            pa.list_(number, size)
            if kind == "fixed"
            else pa.large_list(number)
            if kind == "large"
            else pa.list_(number)
        )
        pq.write_table(pa.table({key: ids, "image": pa.array(values, shape)}), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps({key: item, "image": value}) for item, value in rows)
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        cells = [kind.join(map(str, value or [])) for value in values]
        lines = [f'{item},"{cell}"' for item, cell in zip(ids, cells, strict=True)]
        path.write_text("\n".join([f"{key},image", *lines]), encoding="utf-8")
    return path


def config_of(items, **view):
    data = {"events": {"path": "unused"}, "items": {"path": str(items)}}
    views = {"id": {"kind": "id"}, "image": IMAGE | view}
    return parse_config({"name": "t", "data": data, "views": views}, "test")


def of_items(items, **view):
    return tables.read(config_of(items, **view), "items", [str(items)])


FORMS = [("v.parquet", "list"), ("v.parquet", "fixed"), ("v.parquet", "large"), ("v.parquet", "double"),
         ("v.jsonl", ""), ("v.csv", " "), ("v.csv", "  ")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_a_column_of_the_items(tmp_path, name, kind):
    frame = of_items(write(tmp_path / name, kind=kind)).frame
    assert frame["item_id"].to_list() == ["a", "b", "电"]
    expected = [None if value is None else np.float32(value).tolist() for _, value in ROWS]
    assert frame["view.image"].to_list() == expected


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_a_file_of_its_own(tmp_path, name, kind):
    view = VectorView(**IMAGE, path=str(write(tmp_path / name, kind=kind, key="sku")), key="sku")
    frame, files = vectors.read("image", view)
    assert files == [str(tmp_path / name)]
    assert frame["item_id"].to_list() == ["a", "电"]  # "b" has none
    assert frame["value"].to_list() == [np.float32(value).tolist() for _, value in ROWS if value]


def test_a_separator(tmp_path):
    items = write(tmp_path / "v.csv", kind="|")
    assert of_items(items, separator="|").frame["view.image"].to_list()[2] == [0.0, 2.5, 7.0]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("v.parquet", [1.0, 2.0], "expected 3 numbers, found 2"),
        ("v.jsonl", [1.0, 2.0, 3.0, 4.0], "expected 3 numbers, found 4"),
        ("v.csv", [1.0], "expected 3 numbers, found 1"),
        ("v.parquet", [1.0, math.inf, 2.0], "expected 3 finite numbers, found inf"),
        ("v.parquet", [1.0, math.nan, 2.0], "expected 3 finite numbers, found nan"),
        ("v.parquet", [1.0, None, 2.0], "expected 3 finite numbers, found None"),
        ("v.csv", [1.0, "x", 2.0], "expected 3 finite numbers, found 'x'"),
        ("v.jsonl", [1.0, 1e39, 2.0], "expected 3 finite numbers, found '1e+39'"),
    ],
)
def test_a_vector_that_does_not_fit_is_named(tmp_path, name, value, problem):
    file = write(tmp_path / name, [*ROWS, ("c", value)], kind=" ")
    with pytest.raises(DataError) as error:
        of_items(file)
    assert str(error.value) == f"{file}: row 4: column 'image': {problem}"
    with pytest.raises(DataError) as other:
        vectors.read("image", VectorView(**IMAGE, path=str(file)))
    assert str(other.value) == str(error.value)


def test_the_length_holds_over_files(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [("c", [1.0, 2.0])])
    with pytest.raises(DataError, match="b.parquet: row 1: column 'image': expected 3 numbers, found 2"):
        vectors.read("image", VectorView(**IMAGE, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", [1.0]), ("b", [1.0]), ("a", [2.0])],
            "expected one vector of item 'a', found two: row 1 of .*, row 3 of ",
        ),
        ([("a", [1.0]), ("", [1.0])], "v.jsonl: row 2: expected an item in column 'item_id', found none"),
    ],
)
def test_a_file_whose_items_are_not_clear(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        vectors.read("image", VectorView(**IMAGE, path=str(write(tmp_path / "v.jsonl", rows))))


def test_a_file_without_the_column(tmp_path):
    view = VectorView(**IMAGE | {"column": "imge"}, path=str(write(tmp_path / "v.jsonl")))
    with pytest.raises(DataError, match=r"expected a column 'imge' \(views.photo.column\); did you mean 'image'"):
        vectors.read("photo", view)
    with pytest.raises(DataError, match=r"expected a column 'sku' \(views.photo.key\)"):
        vectors.read("photo", VectorView(**IMAGE, key="sku", path=str(tmp_path / "v.jsonl")))


def test_rows_that_repeat_a_vector_are_duplicates_and_others_are_conflicts(tmp_path):
    rows = [*ROWS, ("a", ROWS[0][1]), ("b", [1.0, 1.0, 1.0]), ("电", [9.0, 9.0, 9.0])]
    table = of_items(write(tmp_path / "v.parquet", rows))
    assert table.frame["view.image"].to_list()[1:] == [[1.0] * 3, [9.0] * 3]  # the newest: the last
    assert table.conflicts == {"image": 1}
    assert table.rejected["reason"].to_list() == ["older row of the id", "older row of the id", "duplicate row"]


def test_views_that_cannot_be():
    def refused(views, items=None):
        with pytest.raises(ConfigError) as error:
            parse_config({"name": "t", "data": {"events": {"path": "e"}, "items": items}, "views": views}, "test")
        return str(error.value)

    assert "views.image reads a column of items: set data.items, or views.image.path" in refused({"image": IMAGE})
    both = {"image": IMAGE, "x": {"kind": "category", "level": "item", "column": "image"}}
    assert "views.x reads 'image', which holds the vectors of views.image" in refused(both, {"path": "i"})


def test_fitting_adds_up_and_leaves_what_never_varies():
    view = VectorView(**IMAGE)
    rows = [[1.0, 5.0], [3.0, 5.0], None, [8.0, 5.0]]
    series = [pl.Series(part, dtype=pl.List(pl.Float32)) for part in (rows[:2], rows[2:3], rows[3:])]
    fitted = fit(view, [sums(one, view) for one in series])
    assert fitted["count"] == 3 and fitted["std"][1] == 1.0
    np.testing.assert_allclose(fitted["mean"], [4.0, 5.0])
    np.testing.assert_allclose(fitted["std"][0], np.std([1.0, 3.0, 8.0]))
    assert fit(view, [sums(series[1], view)])["count"] == 0
    assert catalogue._unfitted("image", series[0]) == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}


# in the model


@pytest.fixture(scope="module")
def images():
    """Of the tiny items: which quarter of the catalogue they are in, as far as can be seen; every fifth has none."""
    draw = np.random.default_rng(0)
    quarter = np.arange(tiny.ITEMS) // (tiny.ITEMS // 4)
    values = (np.eye(4)[quarter] * 3 + draw.normal(0, 0.1, (tiny.ITEMS, 4))).astype(np.float32)
    return [None if place % 5 == 0 else value.tolist() for place, value in enumerate(values)]


@pytest.fixture(scope="module")
def run(tiny_encoder, plain_data, images):
    """A configuration and data with the view `image`."""
    config = tiny.config(tiny_encoder, "views.image={kind: vector, column: image, path: unused}")
    table = plain_data.catalog.table.append_column("image", pa.array(images, pa.list_(pa.float32())))
    there = np.array([image for image in images if image is not None], np.float32)
    scales = {"image": (there.mean(0), there.std(0))}
    return config, Data(
        Catalog(table), Fitted(plain_data.fitted.vocabularies, plain_data.fitted.scales, scales), plain_data.users
    )


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    config, data = run
    histories = data.histories(config)
    model = checkpoint.new_model(config, data, Shards.whole(histories))
    for _ in training.fit(model, Shards.whole(histories), config, Workers()):
        pass
    directory = tmp_path_factory.mktemp("vectors") / "checkpoint"
    checkpoint.save(directory, model, data, ranking.catalogue(model)[1], {})
    return Recommender.load(directory)


def test_vectors_are_standardised_and_missing_ones_stay_missing(run, images):
    config, data = run
    encoded = data.fitted.encode("image", config.views["image"], data.catalog.table["image"])
    missing = np.array([image is None for image in images])
    assert encoded.shape == (tiny.ITEMS, 4) and encoded.dtype == np.float32
    assert np.isnan(encoded[missing]).all() and np.isfinite(encoded[~missing]).all()
    np.testing.assert_allclose(encoded[~missing].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(encoded[~missing].std(0), 1, atol=1e-5)


def test_an_item_without_a_vector_is_masked(trained, images):
    views, _ = ranking.catalogue(trained._model)
    there = views.present[FIRST:, trained._model.item_view_names.index("image")]
    assert there.tolist() == [image is not None for image in images]
    weights = trained.recommend([Request("u003", k=tiny.ITEMS, exclude_seen=False, explain=True)])[0].items
    assert all((one.explanation.views["image"] > 0) == (int(one.item_id[1:]) % 5 != 0) for one in weights)
    assert all(sum(one.explanation.views.values()) == pytest.approx(1, abs=1e-5) for one in weights)


def test_training_moves_the_projection(run, trained):
    config, data = run
    fresh = checkpoint.new_model(config, data, data.shards(config)).encoders["image"].net[1].weight
    assert float((trained._model.encoders["image"].net[1].weight - fresh).detach().abs().max()) > 1e-3


def test_a_checkpoint_alone_scores_as_the_model(run, trained):
    config, data = run
    assert trained._data.catalog.table["image"].equals(data.catalog.table["image"])
    for mine, loaded in zip(data.fitted.vectors["image"], trained._data.fitted.vectors["image"], strict=True):
        np.testing.assert_array_equal(mine, loaded)
    torch.testing.assert_close(ranking.catalogue(trained._model)[1], trained._items, atol=1e-6, rtol=0)


def test_a_new_item_brings_its_vector(trained, images):
    row = tiny.item_rows()[6] | {"image": images[6]}

    def probability(features):
        return trained.score(Request("u003"), [Candidate(features=features)])[1][0].score

    with_text = probability({"image": " ".join(map(str, images[6])), "title": row["title"]})
    assert with_text == pytest.approx(probability({"image": images[6], "title": row["title"]}), abs=1e-5)
    assert abs(probability({"image": images[6]}) - probability({"image": images[16]})) > 1e-4
    assert probability({"title": row["title"], "image": None}) == probability({"title": row["title"]})
    vector = trained._new_vectors([row])[0]  # as in the catalogue, but for the id
    index = trained._model.item_view_names.index("image")
    views = trained._model.item_views(torch.tensor([FIRST + 6]))
    new = trained._data.fitted.encode(
        "image", trained.config.views["image"], pa.array([images[6]], pa.list_(pa.float32()))
    )
    z, present = trained._model.encoders["image"](torch.from_numpy(new))
    assert vector.isfinite().all() and bool(present) and torch.equal(z[0], views.z[0, index])


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ([1.0, 2.0], "expected 4 numbers, found 2"),
        ([1.0, 2.0, 3.0, "x"], "expected 4 finite numbers, found 'x'"),
        ([1.0, 2.0, 3.0, math.nan], "expected 4 finite numbers, found 'nan'"),
        (7, "expected 4 numbers, found 1"),
        ("a b c d", "expected 4 finite numbers, found 'a'"),
    ],
)
def test_a_vector_of_a_request_that_does_not_fit(trained, image, problem):
    with pytest.raises(RequestError) as error:
        trained.score(Request("u003"), [Candidate(features={"image": image})])
    assert (str(error.value), error.value.field) == (f"candidates: 'image': {problem}", "image")


# the verbs


@pytest.mark.ray
@pytest.mark.parametrize("own", [True, False])
def test_from_files_to_lists(tiny_config, images, ray_local, tmp_path, own):
    from pipelines.prepare import prepare

    ids = [row["item_id"] for row in tiny.item_rows()]
    column = pa.array(images, pa.list_(pa.float32()))
    tree = tiny_config.model_dump(mode="json") | {"runs": str(tmp_path)}
    tree["views"]["image"] = IMAGE
    if own:
        order = np.random.default_rng(0).permutation(len(ids))
        skus = [*pa.array(ids).take(order).to_pylist(), "elsewhere"]
        more = pa.table({"sku": skus, "image": [*column.take(order).to_pylist(), [9.0] * 4]})
        pq.write_table(more, tmp_path / "images.parquet")
        tree["views"]["image"] = IMAGE | {"path": str(tmp_path / "images.parquet"), "key": "sku"}
    else:
        rows = pa.Table.from_pylist(tiny.item_rows())
        pq.write_table(rows.append_column("image", column), tmp_path / "items.parquet")
        tree["data"]["items"]["path"] = str(tmp_path / "items.parquet")
    config = parse_config(tree, "test")
    manifest = prepare(config, log=lambda line: None)
    prepared = config.run_dir / "prepared"
    stored = pq.read_table(prepared / "items" / "image.parquet")
    assert stored["item_id"].to_pylist() == ids and stored["value"].to_pylist() == column.to_pylist()
    missing = sum(image is None for image in images)
    assert manifest["views"]["image"] == {"kind": "vector", "level": "item", "values": tiny.ITEMS - missing,
                                          "missing": missing, "unreadable": 0}  # fmt: skip
    assert any(source["file"].endswith("images.parquet") for source in manifest["sources"]) == own

    events = pq.read_table(prepared / "events", partitioning=None)
    pairs = zip(events["item"].to_pylist(), events["split"].to_pylist(), strict=True)
    seen = {item for items, splits in pairs for item, split in zip(items, splits, strict=True) if split == 0}
    there = np.array([image for item, image in zip(ids, images, strict=True) if image and item in seen], np.float32)
    fitted = json.loads((prepared / "fitted.json").read_text())["image"]
    np.testing.assert_allclose(fitted["mean"], there.astype(np.float64).mean(0), rtol=1e-9)
    np.testing.assert_allclose(fitted["std"], there.astype(np.float64).std(0), rtol=1e-9)

    if own:
        again = prepare(config, log=lambda line: None, only_view="image")
        assert again["content_hash"] == manifest["content_hash"]
    directory = train(config, log=lambda line: None)
    for path in (prepared, tmp_path / "images.parquet"):
        if path.exists():
            path.rename(tmp_path / f"gone-{path.name}")  # serving needs the checkpoint alone
    assert recommend(directory, "live", 5, tmp_path / "lists.parquet", log=lambda line: None) == 5 * (tiny.USERS + 3)


@pytest.mark.ray
def test_a_view_can_be_added_later(tiny_config, tiny_prepared, images, ray_local, tmp_path):
    from pipelines.prepare import prepare

    tree = tiny_config.model_dump(mode="json") | {"runs": str(tmp_path)}
    prepare(parse_config(tree, "test"), log=lambda line: None)
    table = pa.table({"item_id": ["i01", "i02"], "image": pa.array([[1.0, 2.0], [3.0, 4.0]])})
    pq.write_table(table, tmp_path / "images.parquet")
    tree["views"]["image"] = IMAGE | {"path": str(tmp_path / "images.parquet")}
    manifest = prepare(parse_config(tree, "test"), log=lambda line: None, only_view="image")
    assert manifest["views"]["image"]["values"] == 2
    whole = prepare(parse_config(tree | {"name": "whole"}, "test"), log=lambda line: None)
    assert whole["content_hash"] == manifest["content_hash"] != tiny_prepared["content_hash"]


@pytest.mark.ray
def test_vectors_of_no_item(tiny_config, ray_local, tmp_path):
    from pipelines.prepare import prepare

    write(tmp_path / "v.parquet")
    tree = tiny_config.model_dump(mode="json") | {"runs": str(tmp_path)}
    tree["views"]["image"] = IMAGE | {"path": str(tmp_path / "v.parquet")}
    with pytest.raises(
        DataError, match="views.image: expected vectors of items of the catalogue, found one for none of 40"
    ):
        prepare(parse_config(tree, "test"), log=lambda line: None)
