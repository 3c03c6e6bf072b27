"""Top-k over a large catalogue by FAISS's inverted lists: far fewer products than exact search, and a recall that was
measured on the users it is for.

Only what cannot change the answer much is left to it: where most items may not come, or too few of its finds may, the
search is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvrec_core.errors import ResourceError
from mvrec_core.index import NOTHING, TopK, top_k

PROBES = (8, 16, 32, 64, 128, 256)  # lists that a search reads
RECALL, AT = 0.98, 20
SPARE = 200  # more finds than are wanted, since some may not come
TRAIN_ROWS = 40  # a list


@dataclass(frozen=True)
class Approximate:
    """recall: of the 20 best, on the users of `build`; rows: of the catalogue that it knows."""

    index: Any
    probes: int
    recall: float
    rows: int

    @staticmethod
    def build(items_ND: Tensor, users_UD: Tensor) -> Approximate | None:
        """With as few lists read as give the recall for these users; None where no number does.

        Raises ResourceError where FAISS is not installed.
        """
        try:
            import faiss
        except ImportError:
            raise ResourceError("serve.ann_above needs FAISS: pip install 'mvrec[faiss]', or leave it out") from None
        items, users = items_ND.cpu().numpy(), users_UD.cpu().numpy()
        lists = max(1, int(2 * len(items) ** 0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(items.shape[1]), items.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = 8
        chosen = np.random.default_rng(0).choice(len(items), min(len(items), TRAIN_ROWS * lists), replace=False)
        index.train(items[chosen])
        index.add(items)
        exact = top_k(users_UD, items_ND, min(AT, len(items))).index.cpu().numpy()
        for probes in PROBES:
            found = _search(index, users, exact.shape[1], probes)[1]
            recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]))
            if recall >= RECALL:
                return Approximate(index, probes, recall, len(items))
        return None

    def top_k(
        self,
        users_BD: Tensor,
        items_ND: Tensor,
        k: int,
        eligible_BN: Tensor,
        fresh: Tensor,
        scale: float | Tensor,
        bias: float | Tensor,
    ) -> TopK:
        """As index.top_k. `fresh`: int64 rows whose vectors are not those of `build`, which are searched exactly."""
        score, row = _search(self.index, users_BD.cpu().numpy(), min(2 * k + SPARE, self.rows), self.probes)
        row_BF = torch.from_numpy(row).to(users_BD.device)
        score_BF = torch.from_numpy(score).to(users_BD) * scale + bias
        fits_BF = (row_BF >= 0) & eligible_BN.gather(1, row_BF.clamp(min=0)) & ~torch.isin(row_BF, fresh)
        newer_BM = users_BD @ items_ND[fresh].T * scale + bias
        row_BF = torch.cat([row_BF, fresh.expand(len(row_BF), -1)], 1)
        score_BF = torch.cat([score_BF, newer_BM], 1)
        fits_BF = torch.cat([fits_BF, eligible_BN[:, fresh]], 1)
        score_BF = score_BF.masked_fill(~fits_BF, -torch.inf)
        row_BF, order = row_BF.sort(dim=1, stable=True)  # of equal scores the lower row comes first
        score_BF, order = score_BF.gather(1, order).sort(dim=1, descending=True, stable=True)
        pad = (0, max(0, k - row_BF.shape[1]))
        index_BK = torch.nn.functional.pad(row_BF.gather(1, order)[:, :k], pad, value=NOTHING)
        score_BK = torch.nn.functional.pad(score_BF[:, :k], pad, value=-torch.inf)
        index_BK = index_BK.masked_fill(score_BK == -torch.inf, NOTHING)
        unsure = (index_BK == NOTHING).any(1) | (eligible_BN.sum(1) < len(items_ND) / 2)
        if unsure.any():
            exact = top_k(users_BD[unsure], items_ND, k, eligible_BN[unsure], scale, bias)
            index_BK[unsure], score_BK[unsure] = exact.index, exact.score
        return TopK(index_BK, score_BK)


def _search(index: Any, users: np.ndarray, k: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    return index.search(users, k, params=faiss.SearchParametersIVF(nprobe=probes))
