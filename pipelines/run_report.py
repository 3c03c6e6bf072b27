"""<run>/report.html: how a run was trained, how well it ranks, what its views are worth, and lists with their reasons.

What metrics.json or the run does not have is left out of the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvrec_core.answers import Answer
from mvrec_core.recommender import Recommender
from mvrec_core.requests import Request
from mvrec_core.sequences import Examples
from pipelines import files
from pipelines.plots import COLOURS, SIZE, Plot, cut, page, plain, plot, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTALS = ("HR@10", "NDCG@10", "MRR@10", "AUC")
SHOWN = "NDCG@10"
VALIDATION = {"NDCG@10": "main", "HR@10": "valid"}  # metric -> colour
PEOPLE, ITEMS, EVENTS = 4, 5, 3  # sample users, items of a list, events of an explanation
ROW = 24  # points of a bar with its name
VIEW_COLOURS = [name for name in COLOURS if name.startswith("view-")]


def write(run_dir: Path, recommender: Recommender, report: Mapping[str, Any]) -> None:
    """Writes report.html beside metrics.json. `report` is what evaluate gives."""
    curves = read_curves(run_dir / "curves.jsonl")
    weights = recommender.stored.view_weights("test")
    files.write_text(
        run_dir / "report.html", html(recommender.config.name, report, curves, *weights, samples(recommender))
    )


def read_curves(path: Path) -> list[dict[str, Any]]:
    """One object an epoch that validation looked after, as train writes them; none where the checkpoint comes from
    elsewhere."""
    if not path.exists():
        return []
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [point for point in points if not point.get("refit")]


def samples(recommender: Recommender) -> list[tuple[str, int, Answer]]:
    """A few users from the shortest history to the longest: id, events, the list with its reasons."""
    histories = recommender.histories
    lengths = np.diff(histories.offsets)
    users = np.flatnonzero(lengths)
    order = users[np.argsort(lengths[users], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(PEOPLE, len(order))).round().astype(int)
    chosen = [int(user) for user in order[places]]
    names = [histories.user_ids[user].as_py() for user in chosen]
    k = min(ITEMS, recommender.n_items)
    answers = recommender.recommend([Request(name, k=k, explain=True) for name in names])
    found = zip(names, lengths[chosen].tolist(), answers, strict=True)
    return [(name, events, answer) for name, events, answer in found if isinstance(answer, Answer)]


def html(
    name: str,
    report: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    examples: Examples,
    weights: Sequence[Mapping[str, float]],
    people: Sequence[tuple[str, int, Answer]],
) -> str:
    """One page with plots, which needs no network, no other file and no JavaScript.

    examples, weights: users of the test and the mean view weights of each one's steps.
    """
    measured = [point for point in curves if point["valid"]]
    views = list(dict.fromkeys(view for each in weights for view in each))
    item_views = [view for _, _, answer in people for item in answer.items for view in reason(item).views]
    colours = {view: VIEW_COLOURS[n % len(VIEW_COLOURS)] for n, view in enumerate(dict.fromkeys(views + item_views))}
    hybrid = (report.get("hybrid") or {}).get("test")
    models = {"mvrec": report["test"], **({"hybrid": hybrid} if hybrid else {})}
    others = {label: other["test"] for label, other in report.get("beside", {}).items()}
    if report.get("init") == "pretrained":
        others = {"from scratch": {}} | others
    models |= others | {label: stages["test"] for label, stages in report["baselines"].items() if stages.get("test")}
    drawn = {label: each for label, each in models.items() if each}
    span = report.get("intervals", {}).get(SHOWN)
    plots = [
        *_if(len(curves) > 1, "loss", "Training loss", lambda ax: _draw_loss(ax, curves)),
        *_if(len(measured) > 1, "valid", "Validation", lambda ax: _draw_valid(ax, measured), legend=VALIDATION),
        *_if(len(drawn) > 1, "models", "Test NDCG@10", lambda ax: _draw_models(ax, drawn, span), rows=len(drawn)),
        *_if(_bins(report), "calibration", "Calibration", lambda ax: _draw_calibration(ax, report["calibration"])),
        *_if(
            views, "weights", "View weights by history length",
            lambda ax: _draw_weights(ax, by_length(examples, weights), colours),
            legend={view: colours[view] for view in views},
        ),
        *_if(
            report.get("view_removed"), "removed", "NDCG@10 without a view",
            lambda ax: _draw_ablation(ax, report["view_removed"], report["view_all"]),
            rows=1 + len(report.get("view_removed") or ()),
        ),
        *_if(
            report.get("view_alone"), "alone", "NDCG@10 by one view alone",
            lambda ax: _draw_ablation(ax, report["view_alone"], report["view_all"]),
            rows=1 + len(report.get("view_alone") or ()),
        ),
    ]  # fmt: skip
    return page(
        "run.html.j2",
        name=name,
        report=report,
        totals={metric: report["test"].get(metric) for metric in TOTALS},
        models=models,
        intervals=report.get("intervals") or {},
        beside=report.get("beside") or {},
        metrics=[metric for metric in report["test"] if metric.endswith("@10") or metric == "AUC"],
        segments={label: each for label, each in report.get("segments", {}).items() if each["users"]},
        beyond=_beyond(report),
        conflict=report.get("view_conflict") or {},
        plots=plots,
        people=people,
        colours={view: colours[view] for view in dict.fromkeys(item_views)},
        strongest=lambda item: sorted(reason(item).events, key=lambda event: -event.score)[:EVENTS],
        others_of=lambda item, told: item.score - reason(item).baseline - sum(event.score for event in told),
    )


def reason(item: Any) -> Any:
    """The explanation of an item that was asked for with one."""
    return item.explanation


def _if(
    there: Any, name: str, title: str, draw: Callable[[Axes], str], legend: Any = None, rows: int | None = None
) -> list[Plot]:
    height = SIZE[1] if rows is None else ROW * rows + 4
    return [plot(name, title, draw, legend, height)] if there else []


def _bins(report: Mapping[str, Any]) -> list[Sequence[float]]:
    bins = (report.get("calibration") or {}).get("bins", [])
    return [each for each in bins if each[0] > 0 and each[1] > 0]


def _beyond(report: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """What lists are like beyond their accuracy: {model: {measure: value}}."""
    found = {"mvrec": (report.get("beyond") or {}).get("test")}
    found |= {label: stages.get("beyond") for label, stages in report["baselines"].items()}
    return {label: values for label, values in found.items() if values}


# plots


def _epochs(ax: Axes, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlim(epochs[0], epochs[-1])
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n) if n else "0"))


def _draw_loss(ax: Axes, curves: Sequence[Mapping[str, Any]]) -> str:
    epochs, losses = [point["epoch"] for point in curves], [point["loss"] for point in curves]
    ax.plot(epochs, losses, color=COLOURS["main"], linewidth=1.8, clip_on=False)
    _epochs(ax, epochs)
    seconds = sum(point["seconds"] for point in curves)
    return f"From {losses[0]:.3f} to {losses[-1]:.3f} in {len(curves)} epochs, {seconds:,.0f} s in all."


def _draw_valid(ax: Axes, measured: Sequence[Mapping[str, Any]]) -> str:
    epochs = [point["epoch"] for point in measured]
    for metric, colour in VALIDATION.items():
        values = [point["valid"][metric] for point in measured]
        ax.plot(epochs, values, color=COLOURS[colour], linewidth=1.8, clip_on=False)
    best = max(measured, key=lambda point: point["valid"][SHOWN])
    ax.plot(best["epoch"], best["valid"][SHOWN], "o", color=COLOURS["main"], markersize=5, clip_on=False)
    ax.set_ylim(0, None)
    _epochs(ax, epochs)
    return f"The best epoch by {SHOWN}, {best['epoch']} ({best['valid'][SHOWN]:.4f}), is the checkpoint."


def _bars(ax: Axes, rows: Sequence[tuple[str, float, str]], most: float) -> None:
    """A named bar a row; its colour by CSS variable."""
    width = SIZE[0]
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(ROW * len(rows) + 4, 0)
    for row, (label, value, colour) in enumerate(rows):
        y = ROW * row
        ax.text(0, y + 12, cut(plain(label), 40), va="baseline", parse_math=False)
        ax.text(width, y + 12, f"{value:.4f}", va="baseline", ha="right", color=COLOURS["quiet"])
        ax.barh(y + 18, width, 5, color=COLOURS["line"])
        ax.barh(y + 18, width * value / most, 5, color=COLOURS[colour])


def _draw_models(ax: Axes, models: Mapping[str, Mapping[str, float]], span: Sequence[float] | None) -> str:
    rows = sorted(((label, each.get(SHOWN, 0.0)) for label, each in models.items()), key=lambda pair: -pair[1])
    most = max([value for _, value in rows] + list(span or [])) or 1.0
    _bars(ax, [(label, value, "main" if label == "mvrec" else "quiet") for label, value in rows], most)
    if span is None:
        return "The model beside the baselines, the whole catalogue ranked."
    y = ROW * [label for label, _ in rows].index("mvrec") + 18
    ax.plot([SIZE[0] * edge / most for edge in span], [y, y], color=COLOURS["ink"], linewidth=1.2, marker="|")
    return f"The model beside the baselines, the whole catalogue ranked. 95% interval: {span[0]:.4f} to {span[1]:.4f}."


def _draw_ablation(ax: Axes, found: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]) -> str:
    rows = sorted(((view, each[SHOWN], "valid") for view, each in found.items()), key=lambda row: row[1])
    most = max([value for _, value, _ in rows] + [whole[SHOWN]]) or 1.0
    _bars(ax, [("all views", whole[SHOWN], "main"), *rows], most)
    users = int(whole["users"])
    return f"On test, {users:,} users, from the same model with views masked: nothing was trained again."


def _draw_calibration(ax: Axes, calibration: Mapping[str, Any]) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    predicted, observed, counts = np.array(_bins({"calibration": calibration}), float).T
    low = 10 ** math.floor(math.log10(min(predicted.min(), observed.min())))
    high = min(1.0, 10 ** math.ceil(math.log10(max(predicted.max(), observed.max()))))
    ax.loglog([low, high], [low, high], color=COLOURS["quiet"], linewidth=1, linestyle=(0, (2, 2)))
    ax.plot(predicted, observed, color=COLOURS["main"], linewidth=1.2)
    size = 10 + 60 * counts / counts.max()
    ax.scatter(predicted, observed, s=size, color=COLOURS["main"], clip_on=False, linewidth=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_major_formatter(lambda n, _: f"{n:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("predicted probability; above, how often it came true")
    known = {"all items": calibration.get("ece"), "top ten": calibration.get("ece_top10")}
    errors = ", ".join(f"{value:.4f} ({what})" for what, value in known.items() if value is not None)
    told = f" Expected calibration error: {errors}." if errors else ""
    return f"On the dashed line a prediction is as often true as it says.{told}"


def by_length(examples: Examples, weights: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The mean weights of users with 1, 2-3, 4-7, ... events before the test: {"4-7": {view: weight}}."""
    groups: dict[int, list[Mapping[str, float]]] = {}
    for length, each in zip(examples.stop.tolist(), weights, strict=True):
        if each:
            groups.setdefault(int(math.log2(length)), []).append(each)
    found = {}
    for power, members in sorted(groups.items()):
        label = "1" if power == 0 else f"{2**power}-{2 ** (power + 1) - 1}"
        found[label] = {view: float(np.mean([each[view] for each in members])) for view in members[0]}
    return found


def _draw_weights(ax: Axes, groups: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    below = np.zeros(len(groups))
    for view in next(iter(groups.values())):
        height = np.array([each[view] for each in groups.values()])
        ax.bar(range(len(groups)), height, width=0.8, bottom=below, color=COLOURS[colours[view]], linewidth=0)
        below += height
    ax.set_xticks(range(len(groups)), [label.split("-")[0] for label in groups])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("events before the test, this many or more")
    ax.set_xlim(-0.6, max(len(groups), 4) - 0.4)
    ax.set_ylim(0, max(1.0, float(below.max())))
    ax.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    most = list(groups)[-1]
    first = max(groups[most], key=lambda view: groups[most][view])
    share = f"{groups[most][first]:.0%}"
    return f"The mean weight of each view in a step. After {most} events the heaviest is {plain(first)}, {share}."
