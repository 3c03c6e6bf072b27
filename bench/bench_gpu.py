"""A BERT of the base size, fine-tuned inside a training step on a GPU: its arithmetic beside the card's.

    python bench/bench_gpu.py [--texts 512] [--tokens 128] [--compile]

The model is the whole one: made-up items whose texts have as many tokens as said, histories of 50 steps, full softmax
over the catalogue, texts tuned in full. `bert_over_matmul` is what the encoder's products take, forward and backward
(6 operations a parameter and token, and attention's), of a whole step's seconds, to the rate of a bf16 product of
8192 x 8192 matrices. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mvrec_core import training
from mvrec_core.batch import collate
from mvrec_core.catalog import Catalog
from mvrec_core.checkpoint import Data, new_model
from mvrec_core.config import Config
from mvrec_core.features import Fitted
from mvrec_core.learner import Learner
from mvrec_core.sequences import train_examples

ITEMS, USERS, EVENTS, WORDS = 20_000, 2_048, 52, 8_000
SIDE, STEPS = 8192, 12
RESULT = Path(__file__).parent / "results" / "gpu.json"


def matmul_rate() -> float:
    """Operations a second."""
    a, b = torch.randn(2, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * SIDE**3 / (time.perf_counter() - began)


def write_encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(WORDS))]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)
    BertModel(BertConfig()).save_pretrained(folder)  # the base size is the default


def made_up(config: Config, tokens: int) -> Data:
    draw = np.random.default_rng(0)
    words = draw.integers(0, WORDS, (ITEMS, tokens - 2)).astype(str)
    items = {
        "item_id": [f"i{number}" for number in range(ITEMS)],
        "display": [None] * ITEMS,
        "text": [" ".join(f"w{word}" for word in row) for row in words],
    }
    item = draw.integers(0, ITEMS, (USERS, EVENTS))
    users = {
        "user_id": [f"u{number}" for number in range(USERS)],
        "item": [[f"i{number}" for number in row] for row in item],
        "timestamp": [list(range(EVENTS))] * USERS,
        "split": pa.array([[0] * (EVENTS - 2) + [1, 2]] * USERS, pa.list_(pa.int8())),
    }
    return Data(Catalog(pa.table(items)), Fitted({}, {}), pa.table(users))


def step_seconds(config: Config, data: Data) -> float:
    model = new_model(config, data, data.shards(config)).to("cuda").train()
    learner = Learner(model, config, 1000)
    histories = data.histories(config)
    examples = train_examples(histories, config.model.max_len)
    seconds = []
    for place in range(STEPS):
        first = place * config.train.batch_size
        batch = collate(histories, examples[first : first + config.train.batch_size]).to("cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        with training.autocast(config, "cuda"):
            loss = model(batch, torch.Generator().manual_seed(place))
        loss.backward()
        learner.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[STEPS // 3 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512, help="read with gradient in a step")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--compile", action="store_true", help="as model.text.compile")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return
    rate = matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder))
        text = {
            "path": folder,
            "tune": "full",
            "max_tokens": given.tokens,
            "live": given.texts,
            "compile": given.compile,
        }
        config = Config.model_validate(
            {
                "name": "gpu",
                "data": {"events": {"path": "none.parquet"}, "items": {"path": "none.parquet"}},
                "views": {"id": {"kind": "id"}, "text": {"kind": "text", "columns": ["title"]}},
                "model": {"max_len": 50, "text": text},
                "train": {"batch_size": 64, "precision": "bf16"},
            }
        )
        seconds = step_seconds(config, made_up(config, given.tokens))
    layers, hidden, inner = 12, 768, 3072  # of BERT base: parameters of its products, without embeddings
    parameters = layers * (4 * hidden**2 + 2 * hidden * inner)
    tokens = given.texts * given.tokens
    work = 6 * parameters * tokens + 3 * layers * 4 * given.tokens * hidden * tokens
    found = {
        "card": torch.cuda.get_device_name(),
        "matmul_tflops": rate / 1e12,
        "bert_tflops": work / seconds / 1e12,
        "bert_over_matmul": work / seconds / rate,
        "step_seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    for name, value in found.items():
        print(f"{name:20} {value if isinstance(value, str) else format(value, '10.3f')}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
