"""MovieLens-100K as `mvrec fetch` leaves it, split without Ray."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

LOG = Path(__file__).parent.parent / "data" / "ml-100k" / "ml-100k.inter"
needs_movielens = pytest.mark.skipif(
    not LOG.exists(), reason=f"needs MovieLens-100K at {LOG} (python -m pipelines.fetch)"
)


def leave_one_out() -> tuple[csr_matrix, np.ndarray]:
    """All events but each user's last, [943, 1682], and the items of the last: ties of time keep the file's order."""
    with LOG.open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    log = np.array(rows, dtype=np.int64)
    user, item, _, time = log[np.lexsort((log[:, 3], log[:, 0]))].T
    last = np.append(user[1:] != user[:-1], True)
    shape = (943, 1682)
    return csr_matrix((np.ones((~last).sum()), (user[~last] - 1, item[~last] - 1)), shape=shape), item[last] - 1
