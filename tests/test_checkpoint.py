from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch

from mvrec_core import checkpoint, ranking, training
from mvrec_core.errors import CheckpointError
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers

FILES = (
    "config.json",
    "fitted.json",
    "item_vectors.npy",
    "items.parquet",
    "metrics.json",
    "model.safetensors",
    "users.parquet",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/tokenizer.json",
)


@pytest.fixture
def copy(plain_checkpoint, tmp_path):
    return shutil.copytree(plain_checkpoint, tmp_path / "checkpoint")


def refused(directory):
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(directory)
    return str(error.value)


def test_the_manifest_lists_every_other_file(copy):
    listed = set(json.loads((copy / "manifest.json").read_text())["files"])
    assert listed == {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(FILES) <= listed


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert refused(copy).startswith(f"{copy / name}: damaged: expected sha256 ")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert refused(copy) == f"{copy / name}: missing, but the manifest lists it"


def test_no_manifest(copy):
    (copy / "manifest.json").unlink()
    assert "manifest.json: missing" in refused(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
def test_a_damaged_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "manifest.json: damaged" in refused(copy)


def test_another_format(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert refused(copy).endswith("manifest.json: expected checkpoint format 4, found 99")


def test_no_directory(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: no such checkpoint directory"


def test_a_checkpoint_is_never_overwritten(copy, plain_model, plain_data):
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoint.save(copy, plain_model, plain_data, ranking.catalogue(plain_model)[1], {})
    assert (copy / "manifest.json").read_bytes() == before


def test_what_is_loaded_scores_as_what_was_saved(plain_model, plain_data, tmp_path):
    vectors = ranking.catalogue(plain_model)[1]
    checkpoint.save(tmp_path / "c", plain_model, plain_data, vectors, {"valid": {"HR@10": 0.5}})
    loaded = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded.item_vectors, vectors)
    torch.testing.assert_close(ranking.catalogue(loaded.model)[1], vectors, atol=1e-6, rtol=0)
    for model in (plain_model, loaded.model):
        model.eval()
    weights = {k: v for k, v in plain_model.state_dict().items() if not k.startswith("text.encoder.")}
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in weights.items())
    torch.testing.assert_close(
        loaded.model.text.embed(["流浪地球"]), plain_model.text.embed(["流浪地球"]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("save", ["whole", "adapter"])
@pytest.mark.parametrize("tune", ["lora", "adalora", "adapter"])
def test_a_tuned_encoder_serves_as_it_was_trained(tiny_encoder, plain_data, tmp_path, tune, save):
    text = (f"model.text.tune={tune}", f"model.text.save={save}", "model.text.lr=0.01")
    config = tiny.config(tiny_encoder, *text, "train.epochs=1")
    histories = plain_data.histories(config)
    model = checkpoint.new_model(config, plain_data, Shards.whole(histories))
    for _ in training.fit(model, Shards.whole(histories), config, Workers()):
        pass
    vectors = ranking.catalogue(model)[1]
    checkpoint.save(tmp_path / "c", model, plain_data, vectors, {})
    loaded = checkpoint.load(tmp_path / "c")
    assert (loaded.config.model.text.tune, loaded.config.model.text.save) == ("frozen", "whole")
    torch.testing.assert_close(ranking.catalogue(loaded.model)[1], vectors, atol=1e-6, rtol=0)
    new = ["title: 流浪地球 2", "title: b"]
    torch.testing.assert_close(loaded.model.text.embed(new), model.text.embed(new), atol=1e-5, rtol=0)


def test_an_adapter_without_its_base(tiny_encoder, plain_data, tmp_path):
    base = shutil.copytree(tiny_encoder, tmp_path / "base")
    config = tiny.config(base, "model.text.tune=lora", "model.text.save=adapter")
    model = checkpoint.new_model(config, plain_data, plain_data.shards(config))
    checkpoint.save(tmp_path / "c", model, plain_data, ranking.catalogue(model)[1], {})
    shutil.rmtree(base)
    assert f"needs the base encoder '{base}' with sha256 " in refused(tmp_path / "c")


def test_a_moved_checkpoint_answers_the_same(copy, plain_checkpoint):
    here, there = Recommender.load(copy), Recommender.load(plain_checkpoint)
    assert here.model_version == there.model_version
    assert here.recommend([Request("u003")]) == there.recommend([Request("u003")])


def test_the_same_model_has_the_same_version_and_a_changed_one_another(plain_model, plain_data, tmp_path):
    vectors = ranking.catalogue(plain_model)[1]
    versions = []
    for name in "abc":
        if name == "c":
            plain_model.bias.data += 1
        checkpoint.save(tmp_path / name, plain_model, plain_data, vectors, {})
        versions.append(checkpoint.load(tmp_path / name).model_version)
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize("change", [lambda w: w.pop("bias"), lambda w: w.update(extra=torch.zeros(1))])
def test_weights_fit_strictly(plain_model, change):
    weights = checkpoint._weights(plain_model)
    change(weights)
    with pytest.raises(RuntimeError, match="bias|extra"):
        checkpoint.load_weights(plain_model, weights)
