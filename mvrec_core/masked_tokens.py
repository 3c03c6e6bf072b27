"""BERT's first task on the catalogue's texts. Shapes: X distinct texts, I tokens, V words, P tokens to tell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvrec_core.errors import ConfigError
from mvrec_core.text import TextEncoder

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # share of the tokens to tell; of them [MASK], and any word; the rest stay


class MaskedTokens(nn.Module):
    """BERT's first task (Devlin et al., NAACL 2019): the head is a transform, then the encoder's own word vectors."""

    def __init__(self, text: TextEncoder):
        super().__init__()
        if text.tokenizer.mask_token_id is None:
            raise ConfigError(
                f"model.text.path: the tokenizer in '{text.config.path}' has no mask token, "
                "which pretrain.text_epochs needs"
            )
        self.text = text
        self.mask = int(text.tokenizer.mask_token_id)
        self.register_buffer("special", torch.tensor(text.tokenizer.all_special_ids), persistent=False)
        self.words = text.encoder.get_input_embeddings()
        n_words, dim = self.words.weight.shape
        self.transform = nn.Sequential(nn.Linear(text.hidden, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias = nn.Parameter(torch.zeros(n_words))

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of the distinct texts, int64 [X] -> the mean cross-entropy of their chosen tokens."""
        size = self.text.size[rows]
        ids_XI = self.text.ids[rows, : int(size.max())].long()
        there_XI = torch.arange(ids_XI.shape[1], device=ids_XI.device) < size[:, None]
        open_XI = there_XI & ~torch.isin(ids_XI, self.special)  # type: ignore[arg-type]
        masked_XI, chosen_XI = mask_tokens(ids_XI, open_XI, self.mask, len(self.bias), generator)
        states = self.text.encoder(input_ids=masked_XI, attention_mask=there_XI.long()).last_hidden_state
        logit_PV = self.transform(states[chosen_XI]) @ self.words.weight.T + self.bias
        return F.cross_entropy(logit_PV.float(), ids_XI[chosen_XI], reduction="sum") / chosen_XI.sum().clamp(min=1)


def mask_tokens(
    ids: Tensor, open_: Tensor, mask: int, n_words: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-> ids as the encoder reads them, and which were chosen, bool: 15% of the open ones, of which 80% become the
    mask, 10% any word, and 10% stay as they are."""
    chance, fate = (torch.rand(ids.shape, generator=generator).to(ids.device) for _ in range(2))
    words = torch.randint(n_words, ids.shape, generator=generator).to(ids.device)
    chosen = open_ & (chance < CHOSEN)
    masked = ids.masked_fill(chosen & (fate < MASKED), mask)
    return torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), words, masked), chosen
