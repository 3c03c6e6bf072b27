"""The BERT-family encoder of item texts. Each distinct text is encoded once; most come from a cache.

Shapes: N catalogue rows (PAD and UNKNOWN included), X distinct texts, H hidden size of the encoder, I tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core import tuning
from mvrec_core.catalog import FIRST
from mvrec_core.config import TextEncoderConfig
from mvrec_core.frozen_layers import FrozenLayers
from mvrec_core.workers import ALONE, Workers

CHUNK = 128  # texts encoded together


@dataclass(frozen=True)
class Live:
    """Texts that a step reads with gradient: m rows of the cache, drawn from more, and what the gradient of each
    counts, so that their sum is on average that of all that they were drawn from.

    row int64 [m], weight float [m]
    """

    row: Tensor
    weight: Tensor


class TextEncoder(nn.Module):
    """Texts of the catalogue -> vectors, by mean pooling over tokens.

    `cache` [X + 1, H] holds every distinct text's vector as of the last refresh, and a last row of zeros for no text.
    Vectors are moved by `centre` and turned by `whiten`, both of all texts, since the vectors of one encoder all point
    much the same way and vary along few directions.
    """

    text_of: Tensor
    ids: Tensor
    size: Tensor
    cache: Tensor
    centre: Tensor
    whiten: Tensor

    def __init__(self, config: TextEncoderConfig, texts: Sequence[str | None]):
        """texts: one an item in index order, None where there is none."""
        super().__init__()
        self.config = config
        self.tokenizer, encoder = tuning.load(str(config.path))
        self.base = tuning.fingerprint(encoder) if config.save == "adapter" else None
        self.encoder = tuning.prepared(encoder, config)
        self.hidden = int(encoder.config.hidden_size)
        self.below: FrozenLayers | None = None  # what is below those that learn, once it is kept
        distinct = sorted({text for text in texts if text})
        place = {text: row for row, text in enumerate(distinct)}
        rows = [len(distinct)] * FIRST + [place[text] if text else len(distinct) for text in texts]
        self.register_buffer("text_of", torch.tensor(rows), persistent=False)  # [N]: row of the cache
        ids, size = self._tokens(distinct)
        self.register_buffer("ids", ids, persistent=False)  # [X, I]
        self.register_buffer("size", size, persistent=False)  # [X]
        self.register_buffer("cache", torch.zeros(len(distinct) + 1, self.hidden))
        self.register_buffer("centre", torch.zeros(self.hidden))
        self.register_buffer("whiten", torch.eye(self.hidden))

    @property
    def tuned(self) -> bool:
        return self.config.tune != "frozen"

    def forward(self, item: Tensor, live: Live | None = None) -> tuple[Tensor, Tensor]:
        """item int64 [n] -> vectors [n, H] and present bool [n]. All vectors are those of the cache, so that none shows
        by its age what it is to the step; the gradient of live ones goes to the encoder."""
        table = self.cache
        if live is not None:
            fresh = self._standard(self._read(live.row))
            table = table.index_add(0, live.row, (fresh - fresh.detach()) * live.weight[:, None])
        row = self.text_of[item]
        return F.embedding(row, table), row < len(self.cache) - 1

    def _standard(self, vectors: Tensor) -> Tensor:
        with torch.autocast(vectors.device.type, enabled=False):  # whitening lifts what bf16 would round
            return (vectors.float() - self.centre) @ self.whiten

    def choose_live(self, item: Tensor, others: Tensor, generator: torch.Generator) -> Live:
        """At most config.live distinct texts, drawn without replacement: half of them, or what these leave over, of
        `others`, items [m] that a step only scores against, and the rest of `item` [n], what its users had and have
        next. With the texts of `item` alone all would move towards the users: nothing would hold the others back. One
        even where there is none, so that every parameter takes part in every step."""
        last = len(self.cache) - 1
        first, rest = self.text_of[item].unique(), self.text_of[others].unique()
        first = first[first < last]
        rest = rest[(rest < last) & ~torch.isin(rest, first)]
        if not len(first) + len(rest):
            return Live(torch.zeros(1, dtype=torch.int64, device=item.device), torch.ones(1, device=item.device))
        limit = self.config.live
        taken = min(len(first), limit - min(len(rest), limit // 2))
        rows, weights = [], []
        for among, count in ((first, taken), (rest, min(len(rest), limit - taken))):
            drawn = torch.randperm(len(among), generator=generator)[:count]
            rows.append(among[drawn.to(among.device)])
            weights.append(torch.full((count,), len(among) / max(1, count), device=item.device))
        return Live(torch.cat(rows), torch.cat(weights))

    def train(self, mode: bool = True) -> TextEncoder:
        """No dropout in layers that do not learn: what they give is the same in each step, kept or not."""
        super().train(mode)
        if self.config.tune == "last_n":
            self.encoder.eval()
            tuning.layers(self.encoder)[-self.config.last_n :].train(mode)
        return self

    @torch.no_grad()
    def keep_frozen(self, workers: Workers = ALONE) -> None:
        """Keeps what the frozen layers give for each text, if they are frozen below some that learn and it takes at
        most config.keep_mb: steps then run those that learn alone. All workers have to call it; with the same bits."""
        tokens = int(self.size.sum())
        lower = self.config.tune == "last_n" and self.config.last_n < len(tuning.layers(self.encoder))
        if not lower or 4e-6 * tokens * self.hidden > self.config.keep_mb:
            return
        below = FrozenLayers(self.encoder, self.config.last_n, self.size)
        rows = (row for row in self._shares(workers) if len(row))
        below.keep(rows, lambda row: self._hidden(self.ids[row], self.size[row])[0], workers.add)
        self.below = below

    def _shares(self, workers: Workers) -> Iterator[Tensor]:
        """Rows [n] of the texts, of a like length, that this worker reads, until all are read; n may be 0 at the end,
        so that all workers have as many."""
        order = self.size[: len(self.cache) - 1].argsort()
        for start in range(0, len(order), CHUNK * workers.size):
            yield order[start + CHUNK * workers.rank :][:CHUNK]

    @torch.no_grad()
    def refresh(self, workers: Workers = ALONE) -> None:
        """Encodes every distinct text anew, without dropout: each worker a part of them, for all, who have to call it.
        The bits are those of one worker."""
        training = self.training
        self.eval()
        texts = self.cache[:-1]
        texts.zero_()
        for row in self._shares(workers):
            some = row if len(row) else row.new_zeros(1)  # an encoder that is shared out runs on all workers or on none
            self.cache[row] = self._read(some)[: len(row)].to(self.cache.dtype)
        if len(texts):
            texts.copy_(workers.add(texts))
            self.centre.copy_(texts.mean(0))
            self.whiten.copy_(_whitening(texts, self.config.ridge))
            texts.copy_(self._standard(texts))
        self.train(training)

    def _read(self, row: Tensor) -> Tensor:
        """Rows [n] of the cache -> the texts' vectors [n, H] as of now, not standardised."""
        with self.below.given(row) if self.below is not None else nullcontext():
            return self.encode(self.ids[row], self.size[row])

    def encode(self, ids: Tensor, size: Tensor) -> Tensor:
        """Token ids [n, I] and lengths [n] -> [n, H], the mean over each text's tokens."""
        hidden, mask = self._hidden(ids, size)
        return (hidden * mask[..., None]).sum(1).float() / size[:, None]

    def _hidden(self, ids: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output for each token [n, longest, H], and where there is one [n, longest]."""
        shortest, longest = (int(length) for length in size.aminmax())
        longest = min(-(-longest // 8) * 8, ids.shape[1])  # few shapes, as in collate
        mask = torch.arange(longest, device=ids.device) < size[:, None]
        padded = mask.long() if shortest < longest else None  # without one, attention has a faster kernel on a GPU
        return self.encoder(input_ids=ids[:, :longest].long(), attention_mask=padded).last_hidden_state, mask

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Standardised vectors [n, H] of any texts, in or out of the catalogue."""
        place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        ids, size = self._tokens(list(place))
        device = self.cache.device
        return self._standard(self.encode(ids.to(device), size.to(device)))[[place[text] for text in texts]]

    def attach(self, optimiser: torch.optim.Optimizer, steps: int, done: int = 0) -> None:
        """What a mode has to do beside a step of the optimiser, of `steps` in all, of which `done` are over."""
        if self.config.tune == "adalora":
            tuning.allocate_ranks(self.encoder, optimiser, steps, done)

    def learning(self) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
        """What a mode keeps from step to step beside parameters: tensors, and the ranks in use."""
        return tuning.allocation(self.encoder) if self.config.tune == "adalora" else ({}, {})

    def resume(self, tensors: dict[str, Tensor], ranks: dict[str, list[bool]]) -> None:
        """Takes back what `learning` gave."""
        if self.config.tune == "adalora":
            tuning.restore_allocation(self.encoder, tensors, ranks)

    def shard(self, device: str, workers: int) -> None:
        """Shares the encoder out over the workers, each of which calls it, and whatever runs the encoder, alike."""
        from mvrec_core import sharding  # here, as importing it takes a second, which a service need not wait for

        sharding.shard(self.encoder, device, workers)

    def gather(self, wanted: bool) -> None:
        """Where it was shared out, it is whole again on the worker that wants it, and on the CPU; all have to call."""
        from mvrec_core import sharding

        if not sharding.sharded(self.encoder):
            return
        weights = sharding.gathered(self.encoder.state_dict(), wanted)
        if wanted:
            encoder = tuning.prepared(tuning.load(str(self.config.path))[1], self.config)
            encoder.load_state_dict(weights)
            self.encoder = encoder

    def save(self, directory: Path) -> None:
        """The encoder and its tokenizer, as TextEncoder loads them with tune "frozen"."""
        tuning.save(directory, self.tokenizer, self.encoder, self.config, self.base)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            return torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        out = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        return out["input_ids"].int(), out["attention_mask"].sum(1)


def _whitening(vectors: Tensor, ridge: float) -> Tensor:
    """[H, H]: what makes the directions of vectors [n, H] uncorrelated and of a like size (ZCA; Kessy, Lewin and
    Strimmer, The American Statistician 2018); those of little variance, which may be noise, are lifted less."""
    centred = (vectors - vectors.mean(0)).double()
    value, direction = torch.linalg.eigh(centred.T @ centred / len(centred))
    lifted = (value + ridge * value.mean()).clamp(min=1e-12).rsqrt()
    return ((direction * lifted) @ direction.T).float()
