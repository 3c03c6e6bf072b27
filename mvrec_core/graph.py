"""The graph view: an item by the company it keeps in histories, in numbers that need no training.

Two items that stand d <= `window` steps apart in a history are linked with weight 1 / d. The matrix of links is turned
into positive pointwise mutual information and factorised, M ~ U S V', and an item's vector is its row of U sqrt(S), as
in Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization" (NIPS 2014), with items for words.

Beside its own company stands that of the items whose texts are like its own, which a new item has too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor

from mvrec_core.catalog import FIRST
from mvrec_core.sequences import Histories

ALIKE, SHARPNESS = 50, 10.0
MOST_NEAR, CHUNK = 20_000, 512  # 100,000 items then take some 20 s of a core
MOST_EVENTS = 5_000_000  # of the first shards; what more events would add is little, and their links take a gigabyte


def vectors(shards: Iterable[Histories], n_rows: int, before: int, size: int, window: int) -> np.ndarray:
    """float32 [n_rows, size] of each row of the catalogue, from the events of the splits below `before`; NaN for an
    item that stands near no other. They have mean 0, and mean square 1 over all numbers. The same input gives the same
    bits."""
    links = csr_matrix((n_rows, n_rows), dtype=np.float64)
    events = 0
    for histories in shards:
        if events >= MOST_EVENTS:
            break
        links += _links(histories.before(before), n_rows, window)
        events += len(histories.item)
    out = np.full((n_rows, size), np.nan, np.float32)
    information = _information(links + links.T)
    there = np.flatnonzero(np.diff(information.indptr))
    if len(there) > 1:
        found = _factors(information[there][:, there], min(size, len(there) - 1))
        found -= found.mean(0)
        out[there] = 0.0
        out[there, : found.shape[1]] = found / max(float(np.sqrt(np.mean(found**2))), 1e-12)
    return out


def alike(
    company_MS: Tensor, text_MH: Tensor, row_M: Tensor, wanted_nH: Tensor, wanted_n: Tensor | None = None
) -> Tensor:
    """[n, S]: the mean company of the ALIKE items whose texts are nearest to some texts, nearer ones counting more:
    softmax of SHARPNESS x cosine. 0 where there is nothing near.

    row_M, wanted_n: catalogue rows; an item is not near itself. Of more than MOST_NEAR items, so many evenly from all
    are looked at.
    """
    if len(row_M) > MOST_NEAR:
        some = torch.linspace(0, len(row_M) - 1, MOST_NEAR, device=row_M.device, dtype=torch.float64).long()
        company_MS, text_MH, row_M = company_MS[some], text_MH[some], row_M[some]
    text_HM = F.normalize(text_MH.float(), dim=-1).T
    parts = []
    for start in range(0, len(wanted_nH), CHUNK):
        with torch.autocast(text_HM.device.type, enabled=False):  # SHARPNESS lifts what bf16 would round
            near_CM = F.normalize(wanted_nH[start : start + CHUNK].float(), dim=-1) @ text_HM
        if wanted_n is not None:
            itself_CM = wanted_n[start : start + CHUNK, None] == row_M
            near_CM = near_CM.masked_fill(itself_CM, -torch.inf)
        best = near_CM.topk(min(ALIKE, len(row_M)), 1)
        share_Ck = (SHARPNESS * best.values).softmax(1).nan_to_num()
        parts.append((share_Ck[..., None] * company_MS[best.indices]).sum(1))
    return torch.cat(parts) if parts else company_MS.new_zeros(0, company_MS.shape[1])


def _links(histories: Histories, n_rows: int, window: int) -> csr_matrix:
    unit = math.lcm(*range(1, window + 1))  # whole numbers: their sum is the same in any order
    user = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    links = csr_matrix((n_rows, n_rows), dtype=np.float64)
    for back in range(1, window + 1):
        one, other = histories.item[:-back], histories.item[back:]
        kept = (user[:-back] == user[back:]) & (one >= FIRST) & (other >= FIRST) & (one != other)
        weight = np.full(int(kept.sum()), unit // back, np.float64)
        pairs = coo_matrix((weight, (one[kept], other[kept])), shape=links.shape)
        links += pairs.tocsr()
    return links


def _information(links: csr_matrix) -> csr_matrix:
    """log(P(i, j) / (P(i) P(j))) where it is above 0."""
    total = np.asarray(links.sum(1)).ravel()
    links = links.tocoo()
    value = np.log(links.data * total.sum() / (total[links.row] * total[links.col]))
    kept = value > 0
    return coo_matrix((value[kept], (links.row[kept], links.col[kept])), shape=links.shape).tocsr()


def _factors(matrix: csr_matrix, size: int) -> np.ndarray:
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])  # ARPACK's own would be another each time
    u, s, _ = svds(matrix, k=size, v0=start)
    order = np.argsort(-s)
    return (u[:, order] * np.sqrt(s[order])).astype(np.float32)
