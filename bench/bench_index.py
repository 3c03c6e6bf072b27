"""Exact top-k against FAISS's inverted lists on a large catalogue, one thread: recall@k and requests a second.

    pip install faiss-cpu; python bench/bench_index.py [--items 1000000] [--users 392]

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

from mvrec_core.approximate import Approximate
from mvrec_core.index import top_k

BATCHES = (1, 32)
SAMPLE = 200  # users on whom the number of lists is chosen; the others are timed
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
    start = time.perf_counter()
    found = [search(users[at : at + batch]) for at in range(0, len(users), batch)]
    return time.perf_counter() - start, np.concatenate(found)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=392)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    items, users = vectors(given.items, given.users, given.dim)
    held = torch.from_numpy(items)

    masks = {batch: torch.ones(batch, given.items, dtype=torch.bool) for batch in BATCHES}
    none = torch.zeros(0, dtype=torch.int64)
    sample, users = users[:SAMPLE], users[SAMPLE:]
    start = time.perf_counter()
    index = Approximate.build(held, torch.from_numpy(sample))
    built = time.perf_counter() - start
    if index is None:
        print("the recall is not reached: search stays exact")
        return
    print(f"{given.items:,} items: built in {built:.0f} s, {index.probes} lists read", flush=True)
    result: dict[str, float] = {"items": given.items, "built_s": round(built, 1), "probes": index.probes}
    for batch in BATCHES:

        def exact(part: np.ndarray, mask: torch.Tensor = masks[batch]) -> np.ndarray:
            return top_k(torch.from_numpy(part), held, given.k, mask).index.numpy()

        def approximate(part: np.ndarray, mask: torch.Tensor = masks[batch]) -> np.ndarray:
            return index.top_k(torch.from_numpy(part), held, given.k, mask, none, 1.0, 0.0).index.numpy()

        exact_s, wanted = seconds(exact, users, batch)
        took, found = seconds(approximate, users, batch)
        result |= {f"ann_recall_{batch}": recall(found, wanted), f"ann_speedup_{batch}": round(exact_s / took, 1)}
        each = [f"{1000 * part / len(users):.1f} ms" for part in (exact_s, took)]
        told = f"exact {each[0]} a request, approximate {each[1]}, recall {recall(found, wanted):.4f}"
        print(f"batches of {batch}: {told}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
