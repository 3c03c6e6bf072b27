"""RecTools' SASRec on MovieLens-100K, in an environment of its own since it needs an older numpy: one thread, seconds
of CPU an epoch as JSON. python bench/peer_rectools.py ml-100k.inter newest"""

from __future__ import annotations

import json
import sys
import time

import pandas as pd
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def seconds(dataset: Dataset, epochs: int) -> float:
    began = time.process_time()
    SASRecModel(
        n_blocks=2, n_heads=2, n_factors=64, session_max_len=100, batch_size=128, loss="softmax", epochs=epochs
    ).fit(dataset)  # fmt: skip
    return time.process_time() - began


def main(path: str, newest: int) -> None:
    torch.set_num_threads(1)
    log = pd.read_csv(path, sep="\t", header=0, names=["user_id", "item_id", "weight", "datetime"])
    log["datetime"] = pd.to_datetime(log["datetime"], unit="s")
    log = log.sort_values("datetime", kind="stable").groupby("user_id").tail(newest)
    dataset = Dataset.construct(log[[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]])
    seconds(dataset, 1)  # imports and caches
    one, four = seconds(dataset, 1), seconds(dataset, 4)
    print(json.dumps({"seconds": (four - one) / 3, "sequences": int(log["user_id"].nunique())}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
