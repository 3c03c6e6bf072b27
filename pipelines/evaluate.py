"""Full-ranking metrics of a checkpoint beside the baselines', by the same split and the same ranking code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from mvrec_core import baselines
from mvrec_core.catalog import FIRST
from mvrec_core.metrics import RankingSums, Ranks, bootstrap
from mvrec_core.recommender import Recommender
from mvrec_core.sequences import STAGES, TRAIN, Examples, Histories
from mvrec_core.training import rank_scores

SHOWN = ("HR@10", "NDCG@10")
COLD_USER, HOT_USER = 5, 50  # train events


def evaluate(
    directory: Path, out: Path | None = None, chosen: tuple[str, ...] | None = None, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Ranks the whole catalogue for every user of valid and test; writes and returns what design calls metrics.json."""
    recommender = Recommender.load(directory)
    config, histories = recommender.config, recommender.histories
    report: dict[str, Any] = {
        "protocol": {
            "split": config.data.split.kind,
            "ranking": "full catalogue",
            "items": recommender.n_items,
            "exclude_seen": config.evaluate.exclude_seen,
            "ties": "expectation over random order",
            "history": "every event before the target",
        }
    }
    names = config.evaluate.baselines if chosen is None else chosen
    report["baselines"] = {name: {} for name in names}
    for stage in STAGES:
        log(f"evaluate: ranking {recommender.n_items:,} items for every user of {stage}")
        examples, ranked = recommender.rank_stage(stage)
        report[stage] = RankingSums.from_ranks(ranked).means()
        report[f"{stage}_users"] = len(ranked)
        for name in names:
            ranks = _baseline(name, histories, examples, stage, recommender)
            report["baselines"][name][stage] = RankingSums.from_ranks(ranks).means()
    report["users"] = len(ranked)
    report["segments"] = _segments(histories, examples, ranked)
    report["intervals"] = {name: span for name, span in bootstrap(ranked, config.seed).items() if name in SHOWN}
    report["seed"], report["init"] = config.seed, config.train.init
    report["model_version"] = recommender.model_version
    if out is not None:
        aside = out.with_suffix(f".tmp-{os.getpid()}")
        aside.write_text(json.dumps(report, indent=1), encoding="utf-8")
        aside.replace(out)
    log(table(config.name, report))
    if out is not None:
        log(f"evaluate: wrote {out}")
    return report


def table(name: str, report: dict[str, Any]) -> str:
    """The model beside the baselines, for people."""
    lines = [f"{'':16}" + "".join(f"{stage + ' ' + metric:>16}" for stage in STAGES for metric in SHOWN)]
    rows = {**report["baselines"], "mvrec": {stage: report[stage] for stage in STAGES}}
    for label, stages in rows.items():
        cells = (stages[stage].get(metric) for stage in STAGES for metric in SHOWN)
        lines.append(f"{label:16}" + "".join(f"{'-' if cell is None else format(cell, '.4f'):>16}" for cell in cells))
    spans = "  ".join(f"{metric} {low:.3f} to {high:.3f}" for metric, (low, high) in report["intervals"].items())
    lines.append(f"{report['users']} test users of '{name}'; 95% intervals of mvrec on test: {spans or 'none'}")
    return "\n".join(lines)


def _baseline(name: str, histories: Histories, examples: Examples, stage: str, recommender: Recommender) -> Ranks:
    """Fitted on all events before the stage, asked with each user's history before the target."""
    interactions = _matrix(histories, histories.split < STAGES[stage], recommender.n_items)
    # threads: one, so that its figures do not depend on the machine
    scorer = baselines.fit(name, interactions, seed=recommender.config.seed)  # type: ignore[arg-type]
    parts = []
    size = recommender.config.evaluate.batch_size
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        scores = np.asarray(scorer.scores(_before(histories, part, recommender.n_items)))
        padded = torch.from_numpy(np.pad(scores, ((0, 0), (FIRST, 0))))
        parts.append(rank_scores(padded, histories, part, recommender.config.evaluate.exclude_seen))
    return Ranks.concatenate(parts)


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


def _segments(histories: Histories, examples: Examples, ranked: Ranks) -> dict[str, Any]:
    """Test metrics by train events of the user (cold < 5 <= warm < 50 <= hot), and of the item (cold 0; hot: the most
    popular items that hold half of the train events; the rest warm)."""
    train = histories.split == TRAIN
    running = np.concatenate([[0], np.cumsum(train)])
    events = (running[histories.offsets[1:]] - running[histories.offsets[:-1]])[examples.user]
    user = np.where(events < COLD_USER, "cold", np.where(events < HOT_USER, "warm", "hot"))
    target = histories.item[histories.offsets[examples.user] + examples.stop]
    counts = np.bincount(histories.item[train], minlength=int(target.max(initial=FIRST)) + 1)
    order = np.argsort(-counts, kind="stable")
    hot = order[: int(np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)) + 1]
    item = np.where(counts[target] == 0, "cold", np.where(np.isin(target, hot), "hot", "warm"))
    return {
        f"{kind}/{label}": {
            "users": int((labels == label).sum()),
            **RankingSums.from_ranks(ranked[labels == label]).means(),
        }
        for kind, labels in (("user", user), ("item", item))
        for label in ("cold", "warm", "hot")
    }


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("evaluate")
