"""Work shared out over the cluster: a task of Ray Data a job."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from mvrec_core.errors import MVRecError


def spread(work: Callable[[int], Any], jobs: Sequence[int]) -> Iterator[str]:
    """What `work` returns for each job, as they end: a task each, run again where a worker dies. Raises MVRecError."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told in our words
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.op_resource_reservation_enabled = False  # it keeps one of two cores idle where there is one map operator

    def run(batch: pa.Table) -> pa.Table:
        pa.set_cpu_count(1)  # a task has one core
        try:
            answers, error = [work(job) for job in batch["job"].to_pylist()], b""
        except MVRecError as mistake:  # a user's, so no reason to try again or to log a traceback
            answers, error = [""], pickle.dumps(mistake)
        return pa.table({"answer": answers, "error": [error] * len(answers)})

    if not jobs:
        return
    stream = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    for row in stream.map_batches(run, batch_size=1, batch_format="pyarrow", zero_copy_batch=True).iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield row["answer"]
