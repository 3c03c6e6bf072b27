"""Full-ranking metrics of a checkpoint beside the baselines', by the same split and the same ranking code."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack

from mvrec_core import baselines
from mvrec_core.ablations import view_conflict, views_removed
from mvrec_core.baselines import Evidence, Features, Scorer
from mvrec_core.beyond_accuracy import Categories, Space, Vectors
from mvrec_core.catalog import FIRST
from mvrec_core.config import EvaluateConfig
from mvrec_core.hybrid import WEIGHTS, blend, standardised
from mvrec_core.index import best
from mvrec_core.metrics import RankingSums, Ranks, bootstrap, ranks
from mvrec_core.ranking import candidates
from mvrec_core.recommender import Recommender
from mvrec_core.sequences import STAGES, TRAIN, Examples, Histories
from mvrec_core.training import CHOSEN_BY
from pipelines import run_report
from pipelines.compare import differences
from pipelines.found import CALIBRATED, LISTS, Found
from pipelines.metrics_table import OURS, SHOWN, table

COLD_USER, HOT_USER = 5, 50  # train events

Blends = Mapping[str, tuple[float, ...]]  # of each CF model the weights to try


def evaluate(
    directory: Path,
    out: Path | None = None,
    settings: EvaluateConfig | None = None,
    log: Callable[[str], None] = print,
    beside: Path | None = None,
) -> dict[str, Any]:
    """Ranks the whole catalogue for every user of valid and test; writes and returns what design calls metrics.json.

    settings: how; None for those of the checkpoint
    beside: another checkpoint on the same test users, which has a row of its own
    """
    clock = Clock()
    with clock("total"):
        recommender = Recommender.load(directory)
        report = _report(recommender, settings or recommender.config.evaluate, clock, log)
        if recommender.config.train.refit:  # it has seen the validation events: these are of the model before
            report["valid"] = _valid(directory)
        with clock("beside"):
            report["beside"] = {} if beside is None else _beside(recommender, directory, beside)
    report["seconds"] = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
    if out is not None:
        aside = out.with_suffix(f".tmp-{os.getpid()}")
        aside.write_text(json.dumps(report, indent=1), encoding="utf-8")
        aside.replace(out)
        run_report.write(out.parent, recommender, report)
    log(table(recommender.config.name, report))
    if out is not None:
        log(f"evaluate: wrote {out}")
    return report


def _valid(directory: Path) -> dict[str, float]:
    """As train measured it, of the model before a refit."""
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8")).get("valid", {})


def _beside(recommender: Recommender, directory: Path, other: Path) -> dict[str, Any]:
    """{label: another checkpoint's metrics, and of each the difference of ours to it}."""
    second = Recommender.load(other)
    found, _ = differences(recommender, second, directory, other)
    scratch = recommender.config.train.init == "pretrained" and second.config.train.init == "scratch"
    return {
        "from scratch" if scratch else f"{second.config.name} {second.model_version}": {
            "checkpoint": str(other),
            "model_version": second.model_version,
            "valid": _valid(other),
            "test": {name: of.second for name, of in found.items()},
            "difference": {
                name: {"mean": of.difference, "low": of.low, "high": of.high, "p": of.p} for name, of in found.items()
            },
        }
    }


class Clock:
    """Adds up the seconds of each part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


def _report(
    recommender: Recommender, settings: EvaluateConfig, clock: Clock, log: Callable[[str], None]
) -> dict[str, Any]:
    histories, seed = recommender.histories, recommender.config.seed
    spaces, train = _spaces(recommender), _train_events(recommender)
    refit = recommender.config.train.refit  # then validation chooses nothing any more
    blends: Blends = {} if refit else dict.fromkeys(settings.hybrid, WEIGHTS)
    report: dict[str, Any] = {
        "protocol": {
            "split": recommender.config.data.split.kind,
            "ranking": "full catalogue",
            "items": recommender.n_items,
            "exclude_seen": settings.exclude_seen,
            "ties": "expectation over random order",
            "history": "every event before the target",
            "trained_on": "train and valid" if refit else "train",
        },
        "baselines": {name: {} for name in settings.baselines},
    }
    for stage in STAGES:
        log(f"evaluate: ranking {recommender.n_items:,} items for every user of {stage}")
        found = Found(spaces if stage == "test" else None, train)
        scorers = _fit(recommender, stage, {*settings.baselines, *blends}, settings, clock)
        _rank(recommender, stage, scorers, blends, settings, found, clock)
        report[stage] = found.means(OURS)
        report[f"{stage}_users"] = len(found.ranks(OURS))
        for name in settings.baselines:
            report["baselines"][name][stage] = found.means(name)
        if stage == "valid":
            report["hybrid"] = _choose(found, blends)
            blends = {report["hybrid"]["cf"]: (report["hybrid"]["weight"],)} if report["hybrid"] else {}
    for of, weights in blends.items():
        report["hybrid"]["test"] = found.means((of, *weights))
    ranked = found.ranks(OURS)
    report["users"] = len(ranked)
    report["segments"] = _segments(histories, found.examples(), ranked, train)
    report["intervals"] = {name: span for name, span in bootstrap(ranked, seed).items() if name in SHOWN}
    report["beyond"] = {"test": found.beyond(OURS)}
    for name in settings.baselines:
        report["baselines"][name]["beyond"] = found.beyond(name)
    report["calibration"] = {
        "ece": found.pairs.error(),
        f"ece_top{CALIBRATED}": found.top_pairs.error(),
        "bins": [list(each) for each in found.pairs.bins()],
        f"bins_top{CALIBRATED}": [list(each) for each in found.top_pairs.bins()],
    }
    if any(view.kind == "time" for view in recommender.config.views.values()):
        _, untold = recommender.stored.ranks("test", timed=False)
        report["test_at_unknown_time"] = RankingSums.from_ranks(untold).means()
    with clock("ablations"):
        report |= views_removed(recommender, "test")
        report["view_conflict"] = view_conflict(recommender, "test").summary()
    report["seed"], report["init"] = seed, recommender.config.train.init
    report["model_version"] = recommender.model_version
    return report


def _fit(
    recommender: Recommender, stage: str, names: set[str], settings: EvaluateConfig, clock: Clock
) -> dict[str, Scorer]:
    """Each baseline on all events before the stage."""
    histories, n = recommender.histories, recommender.n_items
    before = histories.split < STAGES[stage]
    recent = before.copy()
    recent[before] = baselines.newest(histories.time[before], settings.recent_share)
    evidence = Evidence(
        _matrix(histories, before, n),
        _matrix(histories, recent, n),
        _content(recommender) if "content" in names else None,
    )
    scorers = {}
    for name in sorted(names):
        with clock(name):  # threads: one, so that its figures do not depend on the machine
            scorers[name] = baselines.fit(name, evidence, settings, recommender.config.seed)  # type: ignore[arg-type]
    return scorers


def _rank(
    recommender: Recommender,
    stage: str,
    scorers: Mapping[str, Scorer],
    blends: Blends,
    settings: EvaluateConfig,
    found: Found,
    clock: Clock,
) -> None:
    """Every model's ranks of the stage's targets, from the history before each, a batch of users at a time."""
    histories, n = recommender.histories, recommender.n_items
    batches = recommender.stored.scores(stage, settings.batch_size)
    while True:
        with clock(OURS):
            part, ours_BN = next(batches, (None, None))
        if part is None or ours_BN is None:
            return
        found.parts.append(part)
        target, allowed_BN = candidates(histories, part, settings.exclude_seen, FIRST + n, ours_BN.device)
        scores = {OURS: ours_BN}
        before = _before(histories, part, n)
        for name, scorer in scorers.items():
            with clock(name):
                given = np.asarray(scorer.scores(before, part.user))
                scores[name] = torch.from_numpy(np.pad(given, ((0, 0), (FIRST, 0))))
        for name, scores_BN in scores.items():
            with clock(name):
                found.ranked[name].append(ranks(scores_BN, target, ~allowed_BN))
        with clock("hybrid"):
            first_BN = standardised(ours_BN, allowed_BN) if blends else ours_BN
            for name, weights in blends.items():
                second_BN = standardised(scores[name], allowed_BN)
                for weight in weights:
                    mixed_BN = blend(first_BN, second_BN, weight)
                    found.ranked[name, weight].append(ranks(mixed_BN, target, ~allowed_BN))
        if found.spaces is None:
            continue
        taken = [histories.item[histories.events_of(u, s)] for u, s in zip(part.user, part.stop, strict=True)]
        for name, scores_BN in scores.items():
            with clock("beyond"):
                lists_BK = best(scores_BN.masked_fill(~allowed_BN, -torch.inf), max(LISTS)).index
                found.add_lists(name, lists_BK, taken)
            if name == OURS:
                with clock("calibration"):
                    found.add_pairs(scores_BN, allowed_BN, torch.as_tensor(target), lists_BK)


def _choose(found: Found, blends: Blends) -> dict[str, Any]:
    """The CF model and its weight with the best validation NDCG@10, and what was tried; {} where nothing was. Of
    equals the one that leans on our model most."""
    tried = {
        name: {str(weight): found.means((name, weight)).get(CHOSEN_BY, 0.0) for weight in weights}
        for name, weights in blends.items()
    }
    if not tried:
        return {}
    score, weight, best_of = max((s, -float(w), name) for name, by in tried.items() for w, s in by.items())
    return {
        "cf": best_of,
        "weight": -weight,
        "scores": "standardised over each user's candidates",
        "chosen_by": f"valid {CHOSEN_BY}",
        "tried": tried,
        "valid": found.means((best_of, -weight)),
    }


def _spaces(recommender: Recommender) -> dict[str, Space]:
    """What tells how far apart items are: their text, and each category view."""
    texts, name = recommender.item_texts(), recommender.config.text_view
    spaces: dict[str, Space] = {} if texts is None or name is None else {name: Vectors(texts)}
    return spaces | {view: Categories(values) for view, values in recommender.item_categories().items()}


def _content(recommender: Recommender) -> Features | None:
    """[items, F]: the vectors of the items' texts, or where there is no text view, which categories they have."""
    texts, categories = recommender.item_texts(), recommender.item_categories()
    if texts is not None:
        return texts[FIRST:].cpu().numpy()
    if not categories:
        return None
    blocks = []
    for values in categories.values():
        item, place = np.nonzero(values[FIRST:].numpy() >= FIRST)
        value = values[FIRST:].numpy()[item, place] - FIRST
        shape = (recommender.n_items, int(value.max(initial=0)) + 1)
        blocks.append(csr_matrix((np.ones(len(item), np.float32), (item, value)), shape=shape).minimum(1))
    return csr_matrix(hstack(blocks))


def _train_events(recommender: Recommender) -> np.ndarray:
    """int64 [N] of each catalogue row; none of PAD and UNKNOWN."""
    train = recommender.histories.item[recommender.histories.split == TRAIN]
    counts = np.bincount(train, minlength=FIRST + recommender.n_items)
    counts[:FIRST] = 0
    return counts


def _matrix(histories: Histories, chosen: np.ndarray, n_items: int) -> csr_matrix:
    """[users, items] counts of the chosen events."""
    user = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    chosen = chosen & (histories.item >= FIRST)
    return csr_matrix(
        (np.ones(int(chosen.sum()), np.float32), (user[chosen], histories.item[chosen] - FIRST)),
        shape=(len(histories), n_items),
    )


def _before(histories: Histories, examples: Examples, n_items: int) -> csr_matrix:
    rows = [histories.item[histories.events_of(u, s)] for u, s in zip(examples.user, examples.stop, strict=True)]
    rows = [row[row >= FIRST] - FIRST for row in rows]
    user = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    item = np.concatenate(rows) if rows else np.zeros(0, int)
    return csr_matrix((np.ones(len(item), np.float32), (user, item)), shape=(len(rows), n_items))


def _segments(histories: Histories, examples: Examples, ranked: Ranks, train: np.ndarray) -> dict[str, Any]:
    """Test metrics by train events of the user (cold < 5 <= warm < 50 <= hot), and of the item (cold 0, or not in the
    catalogue; hot: the most popular items that hold half of the train events; the rest warm). Of each: its test users,
    their share of all, how many of them have a target that cannot be ranked, and the items of the catalogue in it."""
    running = np.concatenate([[0], np.cumsum(histories.split == TRAIN)])
    events = (running[histories.offsets[1:]] - running[histories.offsets[:-1]])[examples.user]
    user = np.where(events < COLD_USER, "cold", np.where(events < HOT_USER, "warm", "hot"))
    order = np.argsort(-train, kind="stable")
    hot = order[: int(np.searchsorted(np.cumsum(train[order]), train.sum() / 2)) + 1]
    heat = np.where(train == 0, "cold", np.where(np.isin(np.arange(len(train)), hot), "hot", "warm"))
    item = heat[histories.item[histories.offsets[examples.user] + examples.stop]]
    segments: dict[str, Any] = {}
    for kind, labels in (("user", user), ("item", item)):
        for label in ("cold", "warm", "hot"):
            sums = RankingSums.from_ranks(ranked[labels == label])
            segments[f"{kind}/{label}"] = {
                "users": sums.users,
                "share": sums.users / max(1, len(ranked)),
                "unrankable": sums.unrankable,
                **({"items": int((heat[FIRST:] == label).sum())} if kind == "item" else {}),
                **sums.means(),
            }
    return segments


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("evaluate")
