"""The service under load beside what it is measured by, in one run: ratios, and JSON in bench/results/serve.json.

    make bench-serve                                      everything
    python bench/bench_serve.py --only throughput,cached  some of it; --checkpoint DIR for another model

throughput  requests/s over HTTP, beside Recommender.recommend in this project's batches and the same model in a plain
            FastAPI app; histories of 50 to 200 events, 20 items, no request twice
cached      requests/s of users who ask again, beside a deployment that does nothing, behind the same ingress
latency     at half of the highest load p99 over p50; at twice of it good answers, late ones, how soon refusals come
answers     lists as `mvrec recommend` has them; ids that nobody knows; a malformed request among eight
cache       what 100,000 answers leave in a replica and in Redis; without HTTP, which would take hours
swap        versions that are swapped under load: requests that fail, answers that are not of the version they name
kill        one of two replicas is killed under load: requests that fail, and when
soak        memory of the replica under three minutes of load, its caches full: at the end, beside the beginning
ann         bench_index.py: approximate top-k against exact, a million items

Service, load and peers share the cores, so what is compared takes turns, and of each the best round counts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from in_process import batches, first_scores, loaded
from load import Load, ask, paced, steady
from participants import BATCH, DEADLINE_S, ROOT, cpu_s, peer, replicas, serving
from redis import Redis
from rounds import K, Round, best
from safetensors.torch import load_file, save_file

from mvrec_core import sealed
from mvrec_core.requests import Request, digest
from pipelines.recommend import recommend
from serve.alias import publish
from serve.cache import SLOTS, Cache
from serve.redis_client import RedisClient

RESULT = ROOT / "bench" / "results" / "serve.json"
MODELS = ("runs/movielens-1m-seed0/checkpoint", "runs/movielens-100k/checkpoint")  # the first that is there
PARTS = ("throughput", "cached", "latency", "answers", "cache", "swap", "kill", "soak", "ann")
CLIENTS = 2 * BATCH  # two batches: one is answered while the next one fills
ROUNDS, ROUND_S = 3, 5.0
SWAPS = 20
FILL_S, SOAK_S = 240.0, 180.0
NOW = 1_700_000_000  # a time that no history has reached

Values = dict[str, float]


@dataclass
class Bench:
    """The service under test and who asks it: `loader` is a process of its own, `aside` one with the model."""

    checkpoint: Path
    folder: Path
    alias: Path
    port: int
    service: psutil.Popen
    loader: ProcessPoolExecutor
    aside: ProcessPoolExecutor
    users: list[str]  # with histories of 50 to 200 events
    version: int = NOW  # the next request's time: no two are the same

    def fresh(self, number: int) -> list[bytes]:
        """Requests that no cache can answer."""
        self.version += number
        times = range(self.version - number, self.version)
        return [ask("/v1/recommend", self.body(time, now=time)) for time in times]

    def body(self, place: int, **more: Any) -> dict[str, Any]:
        return {"user_id": self.users[place % len(self.users)], "k": K, **more}

    def steady(self, asks: Sequence[bytes], clients: int = CLIENTS, port: int = 0, **more: Any) -> Load:
        return self.loader.submit(steady, port or self.port, asks, clients, **more).result()

    def round(self, asks: Sequence[bytes], clients: int, port: int, who: psutil.Popen, seconds: float) -> Round:
        before = cpu_s(who)
        load = self.steady(asks, clients, port, seconds=seconds)
        return Round(load.rate, (cpu_s(who) - before) / max(1, load.count()))

    def answering(self) -> str:
        """The version that answers now."""
        (one,) = self.steady(self.fresh(1), 1, keep=True).outcomes
        return json.loads(one.body)["model_version"]


# what is measured


def throughput(bench: Bench) -> Values:
    over_http, in_process, plain = [], [], []
    with peer("peer_naive.py", str(bench.checkpoint)) as (port, naive):
        for _ in range(ROUNDS):
            over_http.append(bench.round(bench.fresh(20_000), CLIENTS, bench.port, bench.service, ROUND_S))
            in_process.append(bench.aside.submit(batches, bench.users, bench.version, ROUND_S).result())
            bench.version += NOW // 1000
            plain.append(bench.round(bench.fresh(20_000), 8, port, naive, ROUND_S))
    http, model, one = best(over_http), best(in_process), best(plain)
    return {
        "http_rps": http.rate,
        "inprocess_rps": model.rate,
        "naive_rps": one.rate,
        "http_cpu_ms": 1000 * http.cpu_s,
        "inprocess_cpu_ms": 1000 * model.cpu_s,
        "naive_cpu_ms": 1000 * one.cpu_s,
        "http_over_inprocess": http.rate / model.rate,
        "http_over_naive": http.rate / one.rate,
    }


def cached(bench: Bench) -> Values:
    again = [ask("/v1/recommend", bench.body(place)) for place in range(100)]
    bench.steady(again * 2)
    hits, nothing = [], []
    with peer("peer_noop.py") as (port, noop):
        for _ in range(2 * ROUNDS):
            nothing.append(bench.round(again, 32, port, noop, ROUND_S / 2))
            hits.append(bench.round(again, 32, bench.port, bench.service, ROUND_S / 2))
    hit, idle = best(hits), best(nothing)
    return {
        "cached_rps": hit.rate,
        "noop_rps": idle.rate,
        "cached_cpu_ms": 1000 * hit.cpu_s,
        "noop_cpu_ms": 1000 * idle.cpu_s,
        "cached_over_noop": hit.rate / idle.rate,
    }


def latency(bench: Bench) -> Values:
    """The highest load is measured again between the others, which have its answers to be compared with."""

    def at(rate: float, seconds: float) -> Load:
        asks = bench.fresh(int(2 * rate * seconds))
        return bench.loader.submit(paced, bench.port, asks, rate, seconds).result()

    highest, halves, twices = [], [], []
    for _ in range(ROUNDS):
        highest.append(bench.steady(bench.fresh(20_000), seconds=ROUND_S).rate)
        halves.append(at(0.5 * highest[-1], 2 * ROUND_S))
        twices.append(at(2.0 * highest[-1], 3 * DEADLINE_S))
    half = min(halves, key=lambda load: load.took(99) / load.took(50))
    refused = [one.took for load in twices for one in load.failures]
    return {
        "p50_ms": 1000 * half.took(50),
        "p99_over_p50": half.took(99) / half.took(50),
        "goodput_at_2x": max(load.rate for load in twices) / max(highest),
        "late_at_2x": max(sum(one.took > DEADLINE_S for one in load.outcomes) for load in twices),
        "refused_at_2x": len(refused),
        "refused_p50_ms": 1000 * float(np.median(refused or [math.nan])),
        "errors_at_2x": sum(one.status != 503 for load in twices for one in load.failures),
    }


def answers(bench: Bench) -> Values:
    out = bench.folder / "lists.parquet"
    bench.aside.submit(recommend, bench.checkpoint, "live", K, out, log=print_not).result()
    lists: dict[str, list[str]] = {}
    for user, item in zip(*(pq.read_table(out)[name].to_pylist() for name in ("user_id", "item_id")), strict=True):
        lists.setdefault(user, []).append(item)
    wanted = dict(itertools.islice(lists.items(), 1000))
    load = bench.steady([ask("/v1/recommend", {"user_id": user, "k": K, "now": None}) for user in wanted], keep=True)
    by_user = list(wanted.values())
    equal = sum(one.status == 200 and items(one.body) == by_user[one.ask] for one in load.outcomes)
    draw = np.random.default_rng(0)
    strange = [f"陌生-{number}" for number in draw.integers(1 << 60, size=1000)]
    unknown = [{"user_id": one} if n % 2 else {"events": [{"item_id": one}]} for n, one in enumerate(strange)]
    unknown_load = bench.steady([ask("/v1/recommend", body | {"k": K}) for body in unknown], keep=True)
    errors = sum(one.status != 200 or len(items(one.body)) != K for one in unknown_load.outcomes)
    good = 0
    bad: list[Any] = [10**6, "twenty"]  # one that the model's batch refuses, and one that never gets there
    for number in range(20):
        eight = bench.fresh(7)
        eight.insert(number % 8, ask("/v1/recommend", {"user_id": bench.users[0], "k": bad[number % 2]}))
        statuses = sorted(one.status for one in bench.steady(eight, 8).outcomes)
        good += statuses == [200] * 7 + [422]
    return {
        "equal_lists": equal,
        "equal_users": len(wanted),
        "unknown_ids_errors": errors,
        "malformed_batch": good,
        "malformed_batches": 20,
    }


def cache(bench: Bench) -> Values:
    sys.path.insert(0, str(ROOT / "tests"))
    from redis_server import BINARY, RedisServer

    if BINARY is None:
        print("cache: skipped, since redis-server is not installed")
        return {}
    (value,) = bench.steady([ask("/v1/recommend", bench.body(0))], 1, keep=True).outcomes
    server = RedisServer(bench.folder)
    try:
        return asyncio.run(filled(server.url, value.body))
    finally:
        server.kill()


async def filled(url: str, value: bytes) -> Values:
    """A replica's cache, of its usual size, after 100,000 answers of different requests."""
    redis, most = RedisClient(url), 64 * 2**20
    kept = Cache(most, 600, redis, "bench")

    async def compute() -> bytes:
        return value

    for start in range(0, 100_000, 50):
        keys = [digest("version", Request("user", now=float(place))) for place in range(start, start + 50)]
        await asyncio.gather(*(kept.get(key, compute) for key in keys))
    near = kept._near.currsize
    with Redis.from_url(url) as there:
        stored = there.keys()
        lasting = sum(there.ttl(key) < 0 for key in stored)
    return {
        "cache_near_mb": near / 2**20,
        "cache_redis_keys": len(stored),
        "cache_keys_bounded": float(near <= most and len(stored) <= SLOTS and not lasting),
    }


def swap(bench: Bench) -> Values:
    """Half of the requests are such that the cache has them; each version's lists are known by their scores."""
    other = bench.folder / "other"
    shutil.copytree(bench.checkpoint, other)
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"bias": weights["bias"] + 1}, other / "model.safetensors")
    (other / "manifest.json").unlink()
    sealed.seal(other)
    users = bench.users[:20]
    scores = {
        sealed.verify(one)["model_version"]: bench.aside.submit(first_scores, one, users).result()
        for one in (bench.checkpoint, other)
    }
    told = []  # what publishing writes, elsewhere: else these are two swaps more, seen in the first round
    for one in (other, bench.checkpoint):
        publish(one, bench.folder / "told.json")
        told.append((bench.folder / "told.json").read_bytes())
    before = bench.answering()
    failures = mixed = late = seen = 0
    for number in range(SWAPS):
        asks = []
        for place in range(4000):
            bench.version += 1
            body = {"user_id": users[place % 20], "k": 5, "now": None}
            asks.append(ask("/v1/recommend", body | ({"filter": {"deny": [str(bench.version)]}} if place % 2 else {})))
        under_load = bench.loader.submit(steady, bench.port, asks, 4, 4.0, True)
        time.sleep(0.3)
        (bench.folder / "next").write_bytes(told[number % 2])
        (bench.folder / "next").rename(bench.alias)
        load = under_load.result()
        failures += len(load.failures)
        heard = []
        for one in sorted(load.outcomes, key=lambda one: one.due + one.took):
            if one.status == 200:
                answer = json.loads(one.body)
                heard.append((one.client, answer["model_version"]))
                found = answer["items"][0]["score"]
                mixed += abs(found - scores[heard[-1][1]][one.ask % 20]) > 0.01
        for client in range(4):
            versions = [version for who, version in heard if who == client]
            late += sum(a != b for a, b in zip(versions, versions[1:], strict=False)) > 1  # it went back
        deadline = time.monotonic() + 20
        while (now := bench.answering()) == before and time.monotonic() < deadline:
            time.sleep(0.1)
        seen += now != before
        before = now
    return {"swap_failures": failures, "swap_mixed": mixed + late, "swaps": seen}


def kill(bench: Bench) -> Values:
    """Of two replicas, 5 s after the load has begun. What is in flight on one is about half of the clients."""
    with serving(bench.checkpoint, bench.folder / "two", 2) as (port, service):
        under_load = bench.loader.submit(steady, port, bench.fresh(30_000), 16, 20.0)
        time.sleep(5)
        victim = replicas(service)[0]
        victim.kill()
        at = time.time()
        load = under_load.result()
    ends = [one.due + one.took - at for one in load.failures]
    return {
        "kill_clients": 16,
        "kill_failures": len(ends),
        "kill_failures_after_5s": sum(end > 5 for end in ends),
        "kill_answers_after": sum(one.status == 200 and one.due > at for one in load.outcomes),
    }


def soak(bench: Bench) -> Values:
    """Requests with and without the cache, and events."""
    (replica,) = replicas(bench.service)
    asks = bench.fresh(60_000)
    for place in range(0, len(asks), 4):
        asks[place] = ask("/v1/recommend", bench.body(place % 200))
        asks[place + 1] = ask(
            "/v1/events", {"user_id": f"客户{place % 5000}", "events": [{"item_id": str(place % 999)}]}
        )
    under_load = bench.loader.submit(steady, bench.port, asks, 16, FILL_S + SOAK_S)
    time.sleep(FILL_S)
    early = replica.memory_info().rss
    load = under_load.result()
    end = replica.memory_info().rss
    return {
        "soak_memory_growth": end / early - 1,
        "soak_mb": end / 2**20,
        "soak_requests": len(load.outcomes),
        "soak_failures": len(load.failures),
    }


def ann(bench: Bench) -> Values:
    """At the batch size of the service; speed of single requests beside it."""
    out = subprocess.run(
        [sys.executable, ROOT / "bench" / "bench_index.py"], capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout.splitlines()[-1])
    return {
        "ann_recall": found.get("ann_recall_32", math.nan),
        "ann_speedup": found.get("ann_speedup_32", math.nan),
        "ann_speedup_single": found.get("ann_speedup_1", math.nan),
    }


def items(body: bytes) -> list[str]:
    return [item["item_id"] for item in json.loads(body)["items"]]


def print_not(_: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    directory = given.checkpoint or next((ROOT / one for one in MODELS if (ROOT / one).is_dir()), None)
    if directory is None:
        parser.error(f"none of {', '.join(MODELS)} is there: run make demo SERVE=0, or name a --checkpoint")
    print(f"{directory}", flush=True)
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        alias = Path(folder) / "bench.json"
        publish(directory, alias)
        port, service = stack.enter_context(serving(alias, Path(folder)))
        loader = stack.enter_context(ProcessPoolExecutor(1, context))
        aside = stack.enter_context(ProcessPoolExecutor(1, context, loaded, (directory,)))
        bench = Bench(directory, Path(folder), alias, port, service, loader, aside, users_of(directory))
        for part in given.only.split(","):
            began = time.monotonic()
            values: Values = globals()[part](bench)
            found |= values
            for name, value in values.items():
                print(f"{name:24} {value:10.3f}", flush=True)
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1), encoding="utf-8")


def users_of(directory: Path) -> list[str]:
    users = pq.read_table(directory / "users.parquet", columns=["user_id", "item"])
    sizes = users["item"].combine_chunks().value_lengths().to_numpy()
    return users["user_id"].filter((sizes >= 50) & (sizes <= 200)).to_pylist()


if __name__ == "__main__":
    main()
