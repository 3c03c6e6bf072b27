"""metrics.json for people: the model beside the baselines, as text."""

from __future__ import annotations

from typing import Any

from mvrec_core.sequences import STAGES
from pipelines.found import CALIBRATED

SHOWN = ("HR@10", "NDCG@10")
OURS = "mvrec"


def table(name: str, report: dict[str, Any]) -> str:
    """The model beside the baselines, for people."""
    lines = [f"{'':18}" + "".join(f"{stage + ' ' + metric:>16}" for stage in STAGES for metric in SHOWN)]
    rows = {**report["baselines"], OURS: {stage: report[stage] for stage in STAGES}}
    hybrid = report["hybrid"]
    if hybrid:
        rows["hybrid"] = hybrid
    if "test_at_unknown_time" in report:
        rows["  at unknown time"] = {"valid": {}, "test": report["test_at_unknown_time"]}
    rows |= report["beside"]
    if report["init"] == "pretrained" and "from scratch" not in report["beside"]:
        rows["from scratch"] = {"valid": {}, "test": {}}
    for label, stages in rows.items():
        cells = (stages[stage].get(metric) for stage in STAGES for metric in SHOWN)
        lines.append(f"{label:18}" + "".join(f"{'-' if cell is None else format(cell, '.4f'):>16}" for cell in cells))
    if hybrid:
        lines.append(
            f"hybrid: {1 - hybrid['weight']:.1f} {OURS} + {hybrid['weight']:.1f} {hybrid['cf']}, chosen on valid"
        )
    for label, other in report["beside"].items():
        told = (
            f"{metric} {of['mean']:+.4f} ({of['low']:+.4f} to {of['high']:+.4f}, p {of['p']:.4f})"
            for metric, of in ((name, other["difference"][name]) for name in SHOWN)
        )
        lines.append(f"{OURS} - {label} on test, user by user: {'  '.join(told)}")
    if "from scratch" in rows and not report["beside"]:
        lines.append("from scratch: not measured; --beside CHECKPOINT of a run with train.init=scratch")
    beyond = "  ".join(f"{key} {value:.3f}" for key, value in report["beyond"]["test"].items() if key.endswith("@10"))
    lines.append(f"{OURS} on test: {beyond}")
    calibration = report["calibration"]
    if calibration["ece"] is not None:
        top = calibration[f"ece_top{CALIBRATED}"]
        lines.append(
            f"calibration error of the probability: {calibration['ece']:.5f} of all pairs, "
            f"{top:.4f} of the top {CALIBRATED}"
        )
    spans = "  ".join(f"{metric} {low:.3f} to {high:.3f}" for metric, (low, high) in report["intervals"].items())
    lines.append(f"{report['users']} test users of '{name}'; 95% intervals of {OURS} on test: {spans or 'none'}")
    return "\n".join(lines)
