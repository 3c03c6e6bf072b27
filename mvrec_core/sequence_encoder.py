"""The causal transformer over a history's steps.

Shapes: B users, T steps, D dimensions, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core.batch import rounded
from mvrec_core.config import ModelConfig


class SequenceEncoder(nn.Module):
    """A pre-norm causal transformer over h [B, T, D] -> [B, T, D]. Time is in the steps: the time view.

    Attention falls with distance: head n lowers the logit of a step that is d steps back by d / 2^(2 + 3 n) (the idea
    of Press, Smith and Lewis, ICLR 2022, with other slopes).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.position = nn.Embedding(rounded(config.max_len) + 1, config.dim)
        nn.init.normal_(self.position.weight, std=config.dim**-0.5 / 4)
        self.slopes = [2.0 ** -(2 + 3 * head) for head in range(config.heads)]
        self.enter = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.leave = nn.LayerNorm(config.dim)

    def forward(self, h_BTD: Tensor, at_B: Tensor | None = None) -> Tensor:
        """With int64 at_B the output at one place of each, [B, D]: then the last block computes no other."""
        h_BTD = self.dropout(self.enter(h_BTD) + self.position.weight[: h_BTD.shape[1]])
        place = torch.arange(h_BTD.shape[1], device=h_BTD.device)
        back_TT = place[:, None] - place
        bias_1HTT = -torch.tensor(self.slopes, device=h_BTD.device)[:, None, None] * back_TT
        bias_1HTT = bias_1HTT.masked_fill(back_TT < 0, -torch.inf)[None]
        blocks = list(cast("Iterable[Block]", self.blocks))
        for block in blocks if at_B is None else blocks[:-1]:
            h_BTD = block(h_BTD, bias_1HTT)
        if at_B is None:
            return self.leave(h_BTD)
        if not blocks:
            return self.leave(h_BTD[torch.arange(len(at_B), device=at_B.device), at_B])
        return self.leave(blocks[-1].at(h_BTD, bias_1HTT, at_B))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BTD: Tensor, bias_1HTT: Tensor) -> Tensor:
        b, t, d = h_BTD.shape
        qkv = self.qkv(self.norm_1(h_BTD)).view(b, t, 3, self.heads, d // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = _attention(query, key, value, bias_1HTT)
        h_BTD = h_BTD + self.dropout(self.out(seen.transpose(1, 2).reshape(b, t, d)))
        return h_BTD + self.dropout(self.feed(self.norm_2(h_BTD)))

    def at(self, h_BTD: Tensor, bias_1HTT: Tensor, at_B: Tensor) -> Tensor:
        """[B, D]: what forward gives at one place of each. The others are looked at, so their keys and values are made,
        and nothing else of them."""
        b, t, d = h_BTD.shape
        there = torch.arange(b, device=at_B.device), at_B
        normed_BTD = self.norm_1(h_BTD)
        (query_weight, other_weight), (query_bias, other_bias) = (x.split([d, 2 * d]) for x in self.qkv.parameters())
        query = F.linear(normed_BTD[there], query_weight, query_bias).view(b, self.heads, 1, d // self.heads)
        other = F.linear(normed_BTD, other_weight, other_bias).view(b, t, 2, self.heads, d // self.heads)
        key, value = other.permute(2, 0, 3, 1, 4)
        seen = _attention(query, key, value, bias_1HTT[0, :, at_B].transpose(0, 1)[:, :, None])
        h_BD = h_BTD[there] + self.dropout(self.out(seen.reshape(b, d)))
        return h_BD + self.dropout(self.feed(self.norm_2(h_BD)))


def _attention(query: Tensor, key: Tensor, value: Tensor, bias_1HTT: Tensor) -> Tensor:
    if query.device.type == "cpu":  # there the kernel's backward in fp32 takes half to a fifth of the time of bf16
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=bias_1HTT)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias_1HTT.to(query.dtype))
