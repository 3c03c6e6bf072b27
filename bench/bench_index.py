"""Exact top-k against FAISS's inverted lists on a large catalogue, one thread: recall@k and CPU time.

    pip install faiss-cpu; python bench/bench_index.py [--items 1000000] [--users 128] [--lists 4000]

Vectors lie in clusters of uneven size, as those of real items do, and users' vectors near the items that they like. The
last line is JSON. Ratios are those of one run on one machine, whose exact search is timed beside the other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch

from mvrec_core.index import top_k

BATCHES = (1, 32)
PROBES = (16, 32, 64, 128)  # lists that a search reads
RECALL = 0.98  # which the JSON tells the speed of
CLUSTERS, SPREAD = 2000, 0.7  # SPREAD: length of what is an item's own beside its cluster's unit vector


def vectors(items: int, users: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 [items, dim] and [users, dim]; a user is the mean of a few items of one or two clusters."""
    draw = np.random.default_rng(seed)
    centre = _unit(draw.normal(size=(CLUSTERS, dim)))
    weight = 1 / np.arange(1, CLUSTERS + 1) ** 0.8
    cluster = draw.choice(CLUSTERS, items, p=weight / weight.sum())
    item = _unit(centre[cluster] + SPREAD * draw.normal(size=(items, dim)) / dim**0.5)
    liked = draw.integers(0, items, (users, 3))
    return item.astype(np.float32), _unit(item[liked].sum(1)).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def seconds(search: Callable[[np.ndarray], np.ndarray], users: np.ndarray, batch: int) -> tuple[float, np.ndarray]:
    """For all users, batch by batch, after a first batch that does not count; and their rows."""
    search(users[:batch])
    start = time.process_time()
    found = [search(users[at : at + batch]) for at in range(0, len(users), batch)]
    return time.process_time() - start, np.concatenate(found)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--lists", type=int, default=4000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    items, users = vectors(given.items, given.users, given.dim)
    held = torch.from_numpy(items)

    lists = given.lists
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(given.dim), given.dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 8
    start = time.process_time()
    index.train(items[np.random.default_rng(1).choice(given.items, min(given.items, 40 * lists), replace=False)])
    index.add(items)
    built = time.process_time() - start
    print(f"{given.items:,} items in {lists} lists, built in {built:.0f} s", flush=True)

    def exact(part: np.ndarray) -> np.ndarray:
        return top_k(torch.from_numpy(part), held, given.k).index.numpy()

    def approximate(part: np.ndarray) -> np.ndarray:
        return index.search(part, given.k)[1]

    result: dict[str, float] = {"items": given.items, "lists": lists, "built_s": round(built, 1)}
    for batch in BATCHES:
        exact_s, wanted = seconds(exact, users, batch)
        print(f"batches of {batch}: exact {1000 * exact_s / len(users):.1f} ms a request", flush=True)
        for index.nprobe in PROBES:
            took, found = seconds(approximate, users, batch)
            share, ratio = recall(found, wanted), exact_s / took
            print(f"  {index.nprobe:4d} lists: {1000 * took / len(users):6.2f} ms, recall {share:.4f}, {ratio:.1f}x")
            if share >= RECALL and f"ann_speedup_{batch}" not in result:
                result |= {f"ann_recall_{batch}": round(share, 4), f"ann_speedup_{batch}": round(ratio, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
