"""What a replica counts, and the counts of all replicas as one page in the text format of Prometheus.

Each replica has a registry of its own, so nothing here is global. `values` gives it as plain values with a label
`replica` on every sample, which others can keep and `page` can join: the samples of two replicas never meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mvrec_core.drift import Recent, Reference
from mvrec_core.explanations import ViewUse

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

Values = list[list[Any]]  # [name, help, type, [[sample name, labels, value], ...]] of each metric


class Metrics:
    """The metrics of a replica, whose labels have few values: no ids of users or items, no text. Threads may share it.

    route: as in /openapi.json, "none" for what was refused before it was looked at; status: HTTP, 499 where the client
    has gone; code: of the error, "ok" without one.
    """

    def __init__(self, replica: str):
        self.replica = replica
        self.registry = CollectorRegistry()

        def made(kind: type, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
            return kind(f"mvrec_{name}", text, labels, registry=self.registry, **more)

        self.requests = made(Counter, "requests", "Requests by how they ended", ["route", "status", "code"])
        self.request_seconds = made(
            Histogram, "request_seconds", "From request to answer", ["route", "model_version"], buckets=SECONDS
        )
        self.in_flight = made(Gauge, "requests_in_flight", "Requests under way")
        self.answers = made(Counter, "answers", "Answers by what they rest on", ["route", "rung", "model_version"])
        self.degraded = made(Counter, "degraded_answers", "Answers without live events, for want of their store")
        self.unknown_items = made(Counter, "unknown_items", "Item ids in requests that the catalogue lacks")
        self.cache = made(Counter, "cache_lookups", "Look-ups of answers that are remembered", ["result"])
        self.items = made(Gauge, "items", "Items that may be recommended", ["model_version"])
        self.steps = made(Counter, "view_steps", "Histories looked at for views", ["view", "model_version"])
        self.missing = made(Counter, "view_missing", "The share of them without the view", ["view", "model_version"])
        self.drift = made(
            Gauge, "drift_psi", "PSI against the checkpoint's validation users", ["what", "view", "model_version"]
        )
        stages = made(Histogram, "stage_seconds", "What answers wait for", ["stage"], buckets=SECONDS)
        self.state, self.queue, self.model = (stages.labels(stage) for stage in ("state", "queue", "model"))
        self.labelled = lru_cache(1024)(lambda metric, *labels: metric.labels(*labels))  # which takes 4 us
        self.batch = made(Histogram, "batch_requests", "Requests that the model answers together", buckets=SIZES)
        self._recent: dict[tuple[str, str, str], Recent] = {}
        self._lock = threading.Lock()

    def batched(self, waits: Sequence[float], seconds: float) -> None:
        """A batch of requests that had waited for so long was answered in so many seconds."""
        self.batch.observe(len(waits))
        for wait in waits:
            self.queue.observe(wait)
            self.model.observe(seconds)

    def looked_up(self, result: str) -> None:
        self.labelled(self.cache, result).inc()

    def used(self, model_version: str, reference: Reference | None, use: ViewUse) -> None:
        """What one of the served histories has of the views."""
        for view, share in use.missing.items():
            self.steps.labels(view, model_version).inc()
            self.missing.labels(view, model_version).inc(share)
        if reference is not None:
            for view, weight in use.weights.items():
                if view in reference.weights:
                    self._add(("weight", view, model_version), reference.weights[view], weight)

    def scored(self, model_version: str, reference: Reference | None, score: float, at_now: bool) -> None:
        """The score of the best item of an answer; at_now: whether the request said when it was made."""
        what = "score_at_now" if at_now else "score"
        if reference is not None and what in reference.scores:
            self._add((what, "", model_version), reference.scores[what], score)

    def _add(self, key: tuple[str, str, str], bins: Any, value: float) -> None:
        with self._lock:
            self._recent.setdefault(key, Recent(bins)).add(value)

    def values(self) -> Values:
        """All of it, drift as of now."""
        with self._lock:
            drift = {key: recent.psi() for key, recent in self._recent.items()}
        for key, psi in drift.items():
            if psi is not None:
                self.drift.labels(*key).set(psi)
        out: Values = []
        for metric in self.registry.collect():
            samples = [
                [sample.name, {**sample.labels, "replica": self.replica}, sample.value]
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            out.append([metric.name, metric.documentation, metric.type, samples])
        return out


def page(replicas: Iterable[Values]) -> bytes:
    """The text that Prometheus reads: each metric once, with the samples of all replicas."""
    registry = CollectorRegistry()
    registry.register(_Joined(replicas))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, replicas: Iterable[Values]):
        self.replicas = list(replicas)

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, Metric] = {}
        for values in self.replicas:
            for name, text, kind, samples in values:
                metric = metrics.setdefault(name, Metric(name, text, kind))
                for sample in samples:
                    metric.add_sample(*sample)
        yield from metrics.values()
