"""What the frozen layers of a text encoder give for each text, kept so that steps need not run them.

Shapes: X texts, n of them, I tokens of the longest of these, J tokens of all texts, H hidden size of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvrec_core import tuning


class FrozenLayers:
    """All that is below the layers that learn, and a table that can stand in its place."""

    def __init__(self, encoder: Any, learning: int, size: Tensor):
        """learning: the last so many layers learn; size int64 [X]: tokens of each text"""
        self._encoder, self._learning, self._size = encoder, learning, size
        self._first = size.cumsum(0) - size  # [X]: where a text's tokens begin
        self._tokens = int(size.sum())  # J
        self._table = torch.zeros(self._tokens + 1, encoder.config.hidden_size, device=size.device)

    def keep(self, rows: Iterable[Tensor], read: Callable[[Tensor], Tensor], add: Callable[[Tensor], Tensor]) -> None:
        """rows: of this worker's texts, int64 [n], some at a time; read: these -> the encoder's output [n, I, H]; add:
        sums a tensor over all workers."""
        with self._running(slice(None, -self._learning)):
            for row in rows:
                hidden = read(row)
                place = self._places(row, hidden.shape[1])
                self._table[place] = hidden.float()
        self._table[-1] = 0.0
        self._table.copy_(add(self._table))

    @contextmanager
    def given(self, row: Tensor) -> Iterator[None]:
        """Meanwhile the encoder is the layers that learn, which read what is kept of these texts, int64 [n]."""
        entry = getattr(self._encoder, "embeddings_project", self._encoder.embeddings)  # what gives the layers to read

        def kept(module: Any, read: Any, hidden: Tensor) -> Tensor:
            return F.embedding(self._places(row, hidden.shape[1]), self._table)

        hook = entry.register_forward_hook(kept)
        try:
            with self._running(slice(-self._learning, None)):
                yield
        finally:
            hook.remove()

    def _places(self, row: Tensor, longest: int) -> Tensor:
        """[n, longest]: where the tokens of each text are in the table, J for none."""
        token = torch.arange(longest, device=row.device)
        return torch.where(token < self._size[row][:, None], self._first[row][:, None] + token, self._tokens)

    @contextmanager
    def _running(self, some: slice) -> Iterator[None]:
        """Meanwhile the encoder has these of its layers alone."""
        every = tuning.layers(self._encoder)
        self._encoder.encoder.layer = every[some]
        try:
            yield
        finally:
            self._encoder.encoder.layer = every
