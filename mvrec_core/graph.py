"""The graph view: an item by the company it keeps in histories, in numbers that need no training.

Two items that stand d <= `window` steps apart in a history are linked with weight 1 / d. The matrix of links is turned
into positive pointwise mutual information and factorised, M ~ U S V', and an item's vector is its row of U sqrt(S), as
in Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization" (NIPS 2014), with items for words.

In training a user sees company that its own events, and those of the others of its fold, have not made: else it would
tell of the very step that is to be predicted, as it does of none later. It is read in the same directions: M V S^-1/2
is U sqrt(S), and with M of the others' events alone it is a vector that can stand in its place.

Beside its own company stands that of the items whose texts are like its own, which a new item has too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

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
MOST_NUMBERS = 250_000_000  # of all folds together, a gigabyte: where they would be more, there are fewer folds
MOST_EVENTS = 5_000_000  # of the first shards; what more events would add is little, and their links take a gigabyte


@dataclass(frozen=True)
class Company:
    """
    whole:   float32 [n_rows, size] of each row of the catalogue; NaN for an item that stands near no other. They have
             mean 0, and mean square 1 over all numbers
    without: float32 [folds, n_rows, size], likewise, of the events of all users but those of the fold
    """

    whole: np.ndarray
    without: np.ndarray


def company(shards: Iterable[Histories], n_rows: int, before: int, size: int, window: int, folds: int = 0) -> Company:
    """Of the events of the splits below `before`. The same input gives the same bits."""
    links = [csr_matrix((n_rows, n_rows), dtype=np.float64) for _ in range(max(1, folds))]
    events = 0
    for histories in shards:
        if events >= MOST_EVENTS:
            break
        learnt, fold = histories.before(before), folds_of(histories, folds)
        for number in range(len(links)):
            links[number] += _links(learnt, n_rows, window, fold == number)
        events += len(histories.item)
    total = sum(links[1:], links[0])
    information = _information(total + total.T)
    there = np.flatnonzero(np.diff(information.indptr))
    whole, without = (np.full((*more, n_rows, size), np.nan, np.float32) for more in ((), (folds,)))
    if len(there) > 1:
        found, directions = _factors(information[there][:, there], min(size, len(there) - 1))
        _place(found, there, whole)
        for number in range(folds):
            rest = total - links[number]
            rest.eliminate_zeros()
            others = _information(rest + rest.T)[there][:, there]
            some = np.flatnonzero(np.diff(others.indptr))
            if len(some) > 1:
                _place((others[some] @ directions).astype(np.float32), there[some], without[number])
    return Company(whole, without)


def affordable(folds: int, n_rows: int, size: int) -> int:
    """So many folds as asked for, unless their vectors would be too many; 0 where one user would be all."""
    folds = min(folds, MOST_NUMBERS // (n_rows * size))
    return folds if folds > 1 else 0


def folds_of(histories: Histories, folds: int) -> np.ndarray:
    """int64 [U]: the fold of each user, by a hash of its id; 0 for all where there are no folds."""
    if folds == 0:
        return np.zeros(len(histories), np.int64)
    return np.array([zlib.crc32(user.encode()) % folds for user in histories.user_ids.to_pylist()], np.int64)


def _place(found: np.ndarray, there: np.ndarray, out: np.ndarray) -> None:
    """Standardised, in the rows that are there."""
    found = found - found.mean(0)
    out[there] = 0.0
    out[there, : found.shape[1]] = found / max(float(np.sqrt(np.mean(found**2))), 1e-12)


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
        near_CM = F.normalize(wanted_nH[start : start + CHUNK].float(), dim=-1) @ text_HM
        if wanted_n is not None:
            itself_CM = wanted_n[start : start + CHUNK, None] == row_M
            near_CM = near_CM.masked_fill(itself_CM, -torch.inf)
        best = near_CM.topk(min(ALIKE, len(row_M)), 1)
        share_Ck = (SHARPNESS * best.values).softmax(1).nan_to_num()
        parts.append((share_Ck[..., None] * company_MS[best.indices]).sum(1))
    return torch.cat(parts) if parts else company_MS.new_zeros(0, company_MS.shape[1])


def _links(histories: Histories, n_rows: int, window: int, wanted: np.ndarray) -> csr_matrix:
    """wanted: bool [U], the users whose events count."""
    unit = math.lcm(*range(1, window + 1))  # whole numbers: their sum is the same in any order
    user = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    links = csr_matrix((n_rows, n_rows), dtype=np.float64)
    for back in range(1, window + 1):
        one, other = histories.item[:-back], histories.item[back:]
        kept = wanted[user[:-back]] & (user[:-back] == user[back:]) & (one >= FIRST) & (other >= FIRST) & (one != other)
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


def _factors(matrix: csr_matrix, size: int) -> tuple[np.ndarray, np.ndarray]:
    """U sqrt(S) [rows, size], and V S^-1/2, by which the matrix becomes it."""
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])  # ARPACK's own would be another each time
    u, s, v = svds(matrix, k=size, v0=start)
    order = np.argsort(-s)
    root = np.sqrt(s[order])
    directions = v[order].T / np.where(root > 1e-6, root, np.inf)
    return (u[:, order] * root).astype(np.float32), directions
