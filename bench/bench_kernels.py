"""Why the model computes what it computes the way it does, on a CPU: milliseconds of one thread, forward and backward.

    python bench/bench_kernels.py

Three pairs: softmax over the catalogue with and without its logits in memory, attention in bf16 and in fp32, and
matrix products whose shapes come again or are new each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core import losses

REPEATS = 8


def milliseconds(step: Callable[[int], object], sizes: Iterable[int]) -> float:
    sizes = list(sizes)
    began = time.process_time()
    for size in sizes:
        step(size)
    return 1000 * (time.process_time() - began) / len(sizes)


def cross_entropy(items: int, dim: int, targets: int = 2048) -> tuple[float, float]:
    """With autograd's logits, with losses.softmax."""
    users = F.normalize(torch.randn(targets, dim), dim=-1).requires_grad_()
    table = F.normalize(torch.randn(items, dim), dim=-1).requires_grad_()
    target, tau, bias = torch.randint(items, (targets,)), torch.tensor(0.05), torch.tensor(0.0, requires_grad=True)

    def plain(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(((users / tau) @ table.T).float(), target)
        loss.backward()

    def ours(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.softmax(users, table, target, tau, bias)
        loss.backward()

    return best(plain), best(ours)


def attention(users: int, steps: int) -> tuple[float, float]:
    """In bf16, in fp32."""
    times = []
    for kind in (torch.bfloat16, torch.float32):
        query, key, value = (torch.randn(users, 2, steps, 32, dtype=kind, requires_grad=True) for _ in range(3))

        def step(_: int, q: Tensor = query, k: Tensor = key, v: Tensor = value) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        times.append(best(step))
    return times[0], times[1]


def shapes(rows: int) -> tuple[float, float]:
    """Of a linear layer: rows that are new each time, the same rows again."""
    layer = torch.nn.Linear(64, 256)

    def step(size: int) -> None:
        x = torch.randn(size, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = F.gelu(layer(x)).sum()
        out.backward()

    step(rows)
    return milliseconds(step, range(rows + 1, rows + 101)), milliseconds(step, [rows] * 100)


def best(step: Callable[[int], object]) -> float:
    milliseconds(step, [0] * 2)
    return min(milliseconds(step, [0]) for _ in range(REPEATS))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        *(
            (f"softmax over {n:,} items, d {d}: all logits, a few", *cross_entropy(n, d))
            for n in (3416, 12101)
            for d in (64, 128)
        ),
        *(
            (f"attention, {users} users of {steps} steps: bf16, fp32", *attention(users, steps))
            for users, steps in ((32, 100), (64, 200))
        ),
        ("a linear layer, 3,000 rows: new shapes, one shape", *shapes(3000)),
    ]
    for what, first, second in rows:
        print(f"{what:64} {first:8.1f} {second:8.1f}   {first / second:5.2f}x")


if __name__ == "__main__":
    main()
