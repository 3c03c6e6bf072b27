"""Training beside what it is measured by, in one run: ratios, and a line of JSON in bench/results/train.json.

    make bench-train                                  everything
    python bench/bench_train.py --only reader,padding some of it

rectools   the sequence model alone: our seconds of CPU an epoch, and RecTools' SASRec's; the same sequences, one thread
ray        an epoch of the loop without Ray, and under Ray Train with one worker and with two: with batches of 256, and
           with the configuration's 32, of which a step's fixed part is most; and of two workers that do their halves of
           the batches of 256 without a word to each other, which is what the two cores have to give
reader     an epoch's batches made, and an epoch trained
padding    of all steps of an epoch's batches, those that are none
text       a training step whose texts are read with gradient, and the encoder's forward and backward pass alone with
           the same texts: the median of the steps' ratios, as one step's texts are longer than another's; and how
           often a text of a step would be encoded if each place where it stands encoded it; and with the last layer
           alone tuned, a step that runs the others anew, and one that has kept what they give
memory     the peak of a process that trains on ten times the events
resume     trainings that are killed at a random step and go on: how many end with the same bits

Of one thread the clock is the CPU's, so that other work on the machine disturbs little; of Ray it is the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from mvrec_core import training
from mvrec_core.batch import Batch, collate, rounded
from mvrec_core.batches import epoch_batches
from mvrec_core.checkpoint import new_model
from mvrec_core.config import Config
from mvrec_core.learner import Learner
from mvrec_core.reading import load_config
from mvrec_core.sequences import Examples, train_examples
from mvrec_core.workers import ALONE, Workers
from pipelines import datasets
from pipelines.cluster import connect
from pipelines.prepare import prepare
from pipelines.train import CURVES, train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "pipelines" / "configs"
RESULT = ROOT / "bench" / "results" / "train.json"
NEWEST = 101  # events of a user that both of `rectools` read: 100 steps and the last target
KILLS = 20
TEXTS = 16  # batches of `text`, of which the first is not counted
LARGE = 256  # windows of a batch that is worth two workers
PARTS = ("rectools", "ray", "reader", "padding", "text", "memory", "resume")


def run(config: str, runs: Path, *overrides: str) -> Config:
    return load_config(CONFIGS / config, [f"runs={runs}", "train.threads=1", *overrides])


def quiet(_: str) -> None:
    pass


def epochs(config: Config, clock: Callable[[], float] = time.process_time, workers: Workers = ALONE) -> list[float]:
    """Seconds of each epoch but the first and the last, which is validated too, of the loop without Ray."""
    data, shards = datasets.training(config)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    times = [clock()]
    for _ in training.fit(new_model(config, data, shards), shards, config, workers):
        times.append(clock())
    return np.diff(times)[1:-1].tolist()


def rectools(runs: Path, peer: Path) -> dict[str, float]:
    views = ["views={id: {kind: id}}", "model.dim=64", "model.heads=2", "model.blocks=2", "model.max_len=100"]
    only = [f"data.clean.max_history={NEWEST}", "train.batch_size=128", "train.epochs=6", "train.validate_every=9"]
    config = run("movielens-100k.yaml", runs, "name=alone", "model.dropout=0.2", *views, *only)
    prepare(config, log=quiet)
    command = [peer, ROOT / "bench" / "peer_rectools.py", config.data.events[0].paths[0], str(NEWEST)]
    _, shards = datasets.training(config)
    windows = sum(len(train_examples(histories, 100)) for histories in shards)
    theirs, ours = 0.0, 0.0
    for _ in range(3):  # one after the other: what else the machine does, it does to both
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        theirs = max(theirs, told["sequences"] / told["seconds"])
        ours = max(ours, windows / min(epochs(config)))
    return {"rectools_sequences_s": theirs, "our_sequences_s": ours, "ratio_rectools": ours / theirs}


def ray(runs: Path) -> dict[str, float]:
    def under_ray(workers: int, *overrides: str) -> list[float]:
        name = f"ray-{workers}"
        (runs / name).mkdir(exist_ok=True)
        if not (runs / name / "prepared").exists():
            (runs / name / "prepared").symlink_to((runs / "movielens-100k" / "prepared").absolute())
        config = run("movielens-100k.yaml", runs, f"name={name}", f"train.workers={workers}", *few, *overrides)
        train(config, overwrite=True, log=quiet)
        lines = (config.run_dir / CURVES).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["seconds"] for line in lines][1:-1]

    def alone() -> list[float]:
        return epochs(run("movielens-100k.yaml", runs, *few), clock=time.perf_counter)

    few = ["train.epochs=5", "train.validate_every=9", "train.refit=false"]
    plain, one, two = alone(), under_ray(1), under_ray(2)
    plain, one = plain + alone(), one + under_ray(1)
    large = f"train.batch_size={LARGE}"
    one_large, two_large, two_apart = [], [], []
    for _ in range(2):
        one_large += under_ray(1, large)
        two_large += under_ray(2, large)
        two_apart += apart(runs, 2, *few, large)
    return {
        "ray_over_plain": min(plain) / min(one),
        "workers_2_over_1": min(one_large) / min(two_large),
        "apart_2_over_1": min(one_large) / min(two_apart),
        "workers_2_over_1_small": min(one) / min(two),
    }


def apart(runs: Path, workers: int, *overrides: str) -> list[float]:
    """Seconds of the epochs of workers that know nothing of each other, side by side; of each epoch the longest. Each
    makes its part of the catalogue's vectors and takes it for the others' too: the same work, and no word."""
    command = [sys.executable, __file__, "--runs", str(runs), "--apart"]
    processes = [
        subprocess.Popen([*command, str(rank), str(workers), *overrides], stdout=subprocess.PIPE, text=True)
        for rank in range(workers)
    ]
    lines = [process.communicate()[0].splitlines()[-1] for process in processes]
    return [max(seconds) for seconds in zip(*map(json.loads, lines), strict=True)]


def batches(config: Config) -> Iterator[Batch]:
    _, shards = datasets.training(config)
    for histories in shards:
        draw = np.random.default_rng(0)
        examples = train_examples(histories, config.model.max_len, draw)
        for rows in epoch_batches(examples, config.train.batch_size, [0], Workers()):
            yield collate(histories, examples[rows.mine])


def reader(runs: Path) -> dict[str, float]:
    config = run("movielens-100k.yaml", runs, "train.epochs=4", "train.validate_every=9")
    list(batches(config))
    began = time.process_time()
    list(batches(config))
    read = time.process_time() - began
    return {"reader_over_model": min(epochs(config)) / read}


def padding(_: Path) -> dict[str, float]:
    """Of the sets whose files are there: it follows from the lengths of the histories alone."""
    shares = {}
    for name, config in (("ml-1m", "movielens-1m.yaml"), ("amazon-beauty", "amazon-beauty.yaml")):
        path = Path("data") / name / "events.parquet"
        if not path.exists():
            continue
        settings = load_config(CONFIGS / config)
        counts = pc.value_counts(pq.read_table(path)["user_id"]).field("counts").to_numpy() - 2
        first = np.zeros(len(counts), np.int64)
        length = settings.model.max_len
        windows = -(-counts // length)
        limit = np.minimum(np.repeat(counts, windows), length)
        left = np.repeat(counts - (windows - 1) * length, windows)
        oldest = np.concatenate([[True], np.diff(np.repeat(np.arange(len(counts)), windows)) > 0])
        limit = np.where(oldest, left, limit)
        zero = np.repeat(first, windows)
        examples = Examples(zero, zero, limit - oldest, zero, limit)  # all but the oldest read one step before
        steps, places = 0, 0
        for rows in epoch_batches(examples, settings.train.batch_size, [0], Workers()):
            read = examples.stop[rows.mine] - examples.start[rows.mine]
            steps += int(read.sum()) + len(read)  # and the start of each
            places += (rounded(int(read.max())) + 1) * len(read)
        shares[name] = 1 - steps / places
    return {"padding": max(shares.values(), default=float("nan")), **{f"padding_{n}": s for n, s in shares.items()}}


def new_learner(config: Config) -> Learner:
    data, shards = datasets.training(config)
    learner = Learner(new_model(config, data, shards), config, 100)
    learner.model.train()
    return learner


def step(learner: Learner, batch: Batch, seed: int) -> float:
    """Its seconds."""
    began = time.process_time()
    with training.autocast(learner.config, "cpu"):
        loss = learner.model(batch, torch.Generator().manual_seed(seed))
    loss.backward()
    learner.step()
    return time.process_time() - began


def text(runs: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    config = run("movielens-100k.yaml", runs, "model.text.tune=full")
    learner = new_learner(config)
    model = learner.model
    some = [batch for place, batch in zip(range(TEXTS), batches(config), strict=False)]
    ratios, said, encoded = [], 0, 0
    assert model.text is not None
    for place, batch in enumerate(some):
        whole = step(learner, batch, place)
        item = torch.cat([batch.item.flatten(), batch.target.flatten()])
        row = model.text.text_of[item]
        said += int((row < len(model.text.cache) - 1).sum())
        encoded += len(row[row < len(model.text.cache) - 1].unique())
        every = torch.arange(model.n_rows)
        live = model.text.choose_live(item, every, torch.Generator().manual_seed(place)).row
        began = time.process_time()
        with training.autocast(config, "cpu"):
            vectors = model.text.encode(model.text.ids[live], model.text.size[live])
        vectors.sum().backward()
        ratios.append((time.process_time() - began) / whole)
        learner.optimiser.zero_grad()
    return {
        "text_over_bare": median(ratios[1:]),
        "distinct_factor": said / encoded,
        "anew_over_kept": anew_over_kept(runs, some),
    }


def anew_over_kept(runs: Path, some: list[Batch]) -> float:
    """Of a step with tune last_n: its seconds where frozen layers run anew, to those where what they give is kept."""
    anew, kept = (new_learner(run("movielens-100k.yaml", runs, "model.text.tune=last_n")) for _ in range(2))
    assert kept.model.text is not None
    with training.autocast(kept.config, "cpu"):
        kept.model.text.keep_frozen()
    ratios = [step(anew, batch, place) / step(kept, batch, place) for place, batch in enumerate(some)]
    return median(ratios[1:])


def memory(runs: Path) -> dict[str, float]:
    peaks = []
    for events in (500_000, 5_000_000):
        command = [sys.executable, __file__, "--trains", str(events), "--runs", str(runs)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    return {"memory_10x": peaks[1] / peaks[0], "memory_mb": peaks[1] / 1024}


def trains(events: int, runs: Path) -> int:
    """The peak memory in KiB of this process when it trains an epoch on a made-up log."""
    config = synthetic(events, runs)
    if not (config.run_dir / "prepared" / "manifest.json").exists():
        subprocess.run([sys.executable, __file__, "--prepares", str(events), "--runs", str(runs)], check=True)
    data, shards = datasets.training(config)
    torch.set_num_threads(1)
    for _ in training.fit(new_model(config, data, shards), shards, config, Workers()):
        pass
    return peak_kib()


def peak_kib() -> int:
    """The most memory of this process, whose ru_maxrss would be at least that of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def synthetic(events: int, runs: Path) -> Config:
    tree = {
        "name": f"made-up-{events}",
        "runs": str(runs),
        "data": {"events": {"path": str(runs / f"log-{events}"), "format": "parquet"}, "buckets": events // 100_000},
        "views": {"id": {"kind": "id"}, "time": {"kind": "time"}},
        "model": {"dim": 16, "blocks": 1, "heads": 1, "max_len": 50},
        "train": {"epochs": 1, "batch_size": 512, "loss": "sampled_softmax", "negatives": 32},
    }
    tree["train"]["events_at_once"] = 200_000  # type: ignore[index]
    return Config.model_validate(tree)


def prepares(events: int, runs: Path) -> None:
    """A log of 2,000 items and a user for each 50 events, prepared."""
    import pyarrow as pa

    draw = np.random.default_rng(0)
    folder = runs / f"log-{events}"
    folder.mkdir()
    columns = {
        "user_id": pa.array(draw.integers(0, events // 50, events)).cast(pa.string()),
        "item_id": pa.array((2000 * draw.random(events) ** 2).astype(np.int64)).cast(pa.string()),
        "timestamp": np.sort(draw.integers(1_700_000_000, 1_730_000_000, events)),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    connect()
    prepare(synthetic(events, runs), log=quiet)


def resume(runs: Path) -> dict[str, float]:
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    encoder = runs / "encoder"
    encoder.mkdir()
    tiny.write_encoder(encoder)
    command = [sys.executable, ROOT / "tests" / "killed.py", str(KILLS), "1", encoder, "train.epochs=4"]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    told = [json.loads(line) for line in out.stdout.splitlines()]
    return {"resume_equal": sum(one["equal"] for one in told), "resume_kills": len(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--trains", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prepares", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--apart", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trains:
        print(trains(given.trains, given.runs))
        return
    if given.prepares:
        prepares(given.prepares, given.runs)
        return
    if given.apart:
        rank, size, *overrides = given.apart
        config = run("movielens-100k.yaml", given.runs, *overrides)
        lone = Workers(int(rank), int(size), gather=lambda mine: torch.cat([mine] * int(size)))
        print(json.dumps(epochs(config, time.perf_counter, lone)))
        return
    chosen = given.only.split(",")
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        connect()
        prepare(run("movielens-100k.yaml", runs), log=quiet)
        for part in chosen:
            more = (runs, given.peer) if part == "rectools" else (runs,)
            values = globals()[part](*more)
            found |= values
            for name, value in values.items():
                print(f"{name:24} {value:10.3f}", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
