"""The page of a run, from a trained model and from what may be missing."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import tiny
from pages import Page

from mvrec_core.ablations import view_conflict, views_removed
from mvrec_core.config import EvaluateConfig
from mvrec_core.sequences import Examples
from mvrec_core.training import Epoch
from pipelines import run_report
from pipelines.evaluate import evaluate
from pipelines.train import CURVES, _say

REASONS = {
    "calibration": {"ece": 0.0123, "ece_top10": 0.0345, "bins": [[0.0, 0.0, 3], [0.001, 0.002, 900], [0.1, 0.05, 40]]},
    "beyond": {"test": {"coverage@10": 0.625, "gini_of_items@10": 0.5}},
    "hybrid": {"cf": "als", "weight": 0.3, "test": {"HR@10": 0.5, "NDCG@10": 0.4321}},
}
WHOLE = [
    "Training loss",
    "Validation",
    "Test NDCG@10",
    "Calibration",
    "View weights by history length",
    "NDCG@10 without a view",
    "NDCG@10 by one view alone",
]


@pytest.fixture(scope="module")
def run(plain_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    more = (7, 1e-3, 5.0, 0.1, 0.5, None)  # step, lr, throughput, padding, gradient norm, view weights
    for number in (1, 2, 3):
        valid = {"HR@10": 0.1 * number, "NDCG@10": 0.07 - 0.01 * abs(2 - number)} if number != 3 else {}
        _say(directory, Epoch(number, 3, False, 3.0 - number, 2.0, 10, None, number == 2, number == 3, *more), valid)
    _say(directory, Epoch(1, 1, True, 9.0, 2.0, 10, None, False, True, *more), {})
    evaluate(
        plain_checkpoint, directory / "metrics.json", EvaluateConfig(baselines=("popularity",)), log=lambda _: None
    )
    return directory


@pytest.fixture(scope="module")
def report(run, plain_recommender):
    found = json.loads((run / "metrics.json").read_text()) | views_removed(plain_recommender, "test") | REASONS
    return found | {"view_conflict": view_conflict(plain_recommender, "test").summary()}


@pytest.fixture(scope="module")
def whole(run, report, plain_recommender):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_report.write(run, plain_recommender, report)
    return (run / "report.html").read_text(encoding="utf-8")


def figures(text):
    return re.findall(r"<figure.*?<h2>(.*?)</h2>", text, re.DOTALL)


def test_train_leaves_an_object_an_epoch(run):
    points = run_report.read_curves(run / CURVES)
    assert points[0] == {
        "epoch": 1,
        "refit": False,
        "loss": 2.0,
        "seconds": 2.0,
        "best": False,
        "valid": {"HR@10": 0.1, "NDCG@10": 0.060000000000000005},
    }
    assert [point["epoch"] for point in points] == [1, 2, 3] and points[2]["valid"] == {}
    assert (run / "train.log").read_text().count("\n") == 4


def test_evaluate_writes_the_page(plain_checkpoint, tmp_path):
    evaluate(plain_checkpoint, tmp_path / "metrics.json", EvaluateConfig(baselines=()), log=lambda _: None)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert figures(text) == WHOLE[2:]  # no curves
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]


def test_all_there_is_is_shown(whole, report):
    assert figures(whole) == WHOLE
    texts = Page(whole).texts
    for metric in ("HR@10", "NDCG@10", "AUC"):
        assert texts.count(f"{report['test'][metric]:.4f}") >= 2, metric  # total, and row of the table
    for text in ("popularity", "hybrid", "0.4321", "coverage@10", "gini of items@10", "0.625", "id and text"):
        assert text in texts, text
    for text in (
        "From 2.000 to 0.000 in 3 epochs, 6 s in all.",
        "The best epoch by NDCG@10, 2 (0.0700), is the checkpoint.",
        "Expected calibration error: 0.0123 (all items), 0.0345 (top ten).",
    ):
        assert any(text in each for each in texts), text
    for view, metrics in report["view_removed"].items():
        assert view in texts and f"{metrics['NDCG@10']:.4f}" in texts


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("calibration", "Calibration"),
        ("view_removed", "NDCG@10 without a view"),
        ("view_alone", "NDCG@10 by one view alone"),
        ("beyond", None),
        ("hybrid", None),
        ("view_conflict", None),
        ("intervals", None),
        ("segments", None),
    ],
)
def test_what_metrics_lack_is_left_out(report, plain_recommender, tmp_path, key, figure):
    run_report.write(tmp_path, plain_recommender, {name: each for name, each in report.items() if name != key})
    assert figures((tmp_path / "report.html").read_text()) == [name for name in WHOLE[2:] if name != figure]


def test_lists_come_with_titles_and_reasons_that_are_true(whole, plain_recommender):
    people = run_report.samples(plain_recommender)
    assert len(people) == 4 and [events for _, events, _ in people] == sorted(events for _, events, _ in people)
    texts = " ".join(Page(whole).texts)
    for user, _, answer in people:
        assert f"User {user}" in texts
        for item in answer.items:
            assert f"{item.rank}. {item.display or item.item_id}" in texts
            strongest = max(item.explanation.events, key=lambda event: event.score, default=None)
            if strongest is not None:
                assert f"{strongest.display or strongest.item_id}  {strongest.score:+.2f}," in texts
    assert any(item.explanation.events for _, _, answer in people for item in answer.items)


def test_the_page_needs_nothing_but_itself_and_its_ids_are_its_own(whole):
    page = Page(whole)
    assert "://" not in whole and "@import" not in whole
    assert not {"script", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    named = [name for value in page.values("aria-labelledby") for name in str(value).split()]
    drawn = re.findall(r'(?:href="|url\()#([^")]+)', whole)
    assert len(drawn) > 10 and set(named + drawn) <= set(ids)
    plots = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #", plots)
    assert set(re.findall(r"var\((--[\w-]+)\)", whole)) <= set(re.findall(r"(--[\w-]+):", whole))


def test_names_are_text_and_never_markup(report, plain_recommender):
    evil = "<script>alert('坏')</script>"
    weights = [{evil: 1.0}]
    one = Examples(*(np.array([1]) for _ in range(5)))
    found = report | {"baselines": {evil: {"test": report["test"]}}, "beyond": {"test": {evil: 1.0}}}
    page = Page(run_report.html(evil, found, [], one, weights, []))
    assert "script" not in {tag for tag, _ in page.tags} and page.texts.count(evil) >= 4


def test_weights_are_means_over_users_of_a_like_length():
    stop = np.array([1, 2, 3, 4, 9])
    weights = [{"id": 1.0}, {"id": 0.5}, {"id": 0.25}, {}, {"id": 0.0}]
    found = run_report.by_length(Examples(stop, stop, stop, stop, stop), weights)
    assert found == {"1": {"id": 1.0}, "2-3": {"id": 0.375}, "8-15": {"id": 0.0}}


def test_the_weights_of_a_stage_are_those_of_its_users(plain_recommender):
    examples, weights = plain_recommender.stored.view_weights("test")
    assert len(examples) == len(weights) == tiny.USERS
    assert all(sum(each.values()) == pytest.approx(1, abs=1e-5) for each in weights)
    assert len({round(each["id"], 6) for each in weights}) > 20
