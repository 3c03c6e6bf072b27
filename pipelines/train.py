"""Data-parallel training on Ray Train: every worker runs mvrec_core.training.fit on its share of each batch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mvrec_core import checkpoint, pretrained, ranking, sealed, training
from mvrec_core.calibration import Scaling
from mvrec_core.config import Config
from mvrec_core.errors import CheckpointError, MVRecError, ResourceError
from mvrec_core.model import MVRec
from mvrec_core.reading import parse_config
from mvrec_core.reference import reference
from mvrec_core.resume import States
from mvrec_core.sequences import TEST, VALID
from mvrec_core.sharding import gather_rows
from mvrec_core.shards import Shards
from mvrec_core.workers import Workers
from pipelines import datasets, trackers
from pipelines.cluster import connect, node_cores
from pipelines.files import publish

SHOWN = ("HR@10", "NDCG@10", "MRR@10")
RESUME = "resume"  # in the run, while it trains: states to go on from
CURVES = "curves.jsonl"  # in the run, for programs: epoch, loss, seconds, best, valid as JSON


def train(
    config: Config, overwrite: bool = False, log: Callable[[str], None] = print, callbacks: Sequence[Any] = ()
) -> Path:
    """Trains on <run>/prepared and publishes the best epoch, or its refit, as <run>/checkpoint, which it returns. A run
    that was killed goes on from its newest state in <run>/resume, and so does one of which a worker died.

    callbacks: of Ray Train, which hear what each epoch gave

    Raises CheckpointError where the run has a checkpoint already, ResourceError where the cluster is too small.
    """
    target = config.run_dir / "checkpoint"
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target}: run '{config.name}' has a checkpoint already; take another name=, or --overwrite to train anew"
        )
    data, shards = datasets.training(config)
    _new_model(config, data, replace(shards, events=()))  # what is wrong with data or model shows here, at once
    trackers.check(config)
    written = on_workers("train", _worker, config, target, log, callbacks)
    shutil.rmtree(config.run_dir / RESUME, ignore_errors=True)
    return written


def on_workers(
    verb: str,
    worker: Callable[[dict[str, Any]], None],
    config: Config,
    target: Path,
    log: Callable[[str], None],
    callbacks: Sequence[Any] = (),
) -> Path:
    """Runs `worker` on each of train.workers and publishes the directory that rank 0 reports at the end as `target`,
    which it returns. What rank 0 appends to <run>/<verb>.log is logged.

    Raises ResourceError where the cluster is too small, and any MVRecError that a worker fails with.
    """
    connect()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = _use_gpu(config)
    _check_room(config, gpu)
    told = f", loss {config.train.loss}, {config.train.init}" if verb == "train" else ""
    log(f"{verb}: {config.train.workers} worker(s) on {'GPU' if gpu else 'CPU'}{told}")
    tree = json.loads(config.model_dump_json())
    storage = (config.run_dir / "ray").absolute()
    mistake = storage / "mistake"
    trainer = TorchTrainer(
        _unless(mistake, worker),
        train_loop_config={"config": tree, "cwd": str(Path.cwd()), "gpu": gpu, "heard": bool(callbacks)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(  # a name of its own: Ray resumes a name that it has seen
            name=f"{config.name}-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            callbacks=list(callbacks),
        ),
    )
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    with _shown(progress(config.run_dir, verb), log):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _user_error(error) or error from None
    assert result.checkpoint is not None
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    result.checkpoint.to_directory(str(aside))
    sealed.verify(aside)
    publish(aside, target)
    shutil.rmtree(storage, ignore_errors=True)
    log(f"{verb}: wrote {target}")
    return target


def _unless(mistake: Path, worker: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The worker, but that a user's mistake is not tried again, as a death is."""

    def run(settings: dict[str, Any]) -> None:
        if mistake.exists():
            raise pickle.loads(mistake.read_bytes())
        try:
            worker(settings)
        except MVRecError as error:
            mistake.write_bytes(pickle.dumps(error))
            raise

    return run


def progress(run: Path, verb: str) -> Path:
    """A line an epoch, written by rank 0, shown by the driver."""
    return run / f"{verb}.log"


def _use_gpu(config: Config) -> bool:
    import ray

    there = ray.cluster_resources().get("GPU", 0)
    if config.train.device == "gpu" and there < config.train.workers:
        raise ResourceError(
            f"train.device is gpu and train.workers {config.train.workers}, but the cluster has {there:g} GPUs"
        )
    return config.train.device != "cpu" and there >= config.train.workers


def _check_room(config: Config, gpu: bool) -> None:
    import ray

    cores = ray.cluster_resources().get("CPU", 0)
    if config.train.workers > cores:
        raise ResourceError(f"train.workers is {config.train.workers}, but the cluster has {cores:g} cores")


def _user_error(error: Exception) -> MVRecError | None:
    """The MVRecError that a worker failed with, if that is why."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)
        cause = getattr(cause, "cause", cause)
        if isinstance(cause, MVRecError):
            return cause
    return None


def join(settings: dict[str, Any]) -> tuple[Config, Workers]:
    """On a worker: the run's configuration and its place among the others, with torch's threads and device set."""
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if Path(settings["cwd"]).is_dir():  # on one machine: paths mean what they mean to the driver
        os.chdir(settings["cwd"])
    config = parse_config(settings["config"], "the run's configuration")
    context = ray.train.get_context()
    here = context.get_local_world_size()
    torch.set_num_threads(config.train.threads or max(1, node_cores() // here))
    torch.use_deterministic_algorithms(not settings["gpu"])  # the same seed gives the same bits on CPU
    device = ray.train.torch.get_device() if settings["gpu"] else torch.device("cpu")

    def add(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device)
        if context.get_world_size() > 1:
            dist.all_reduce(moved)
        return moved.cpu()

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        # buffers are the same everywhere, or refreshed on purpose; there is no need to send them each step
        return ray.train.torch.prepare_model(
            model, move_to_device=False, parallel_strategy_kwargs={"broadcast_buffers": False}
        )

    size = context.get_world_size()
    return config, Workers(context.get_world_rank(), size, str(device), wrap, add, gather_rows if size > 1 else None)


def _worker(settings: dict[str, Any]) -> None:
    """Runs on each worker; rank 0 reports the checkpoint at the end."""
    import ray.train

    config, workers = join(settings)
    data, shards = datasets.training(config)
    leads, group = workers.rank == 0, ray.util.get_current_placement_group()
    metrics: dict[str, Any] = {}
    epochs = _epochs(config, data, shards, workers)
    if leads:
        (config.run_dir / CURVES).write_text("", encoding="utf-8")
    for model, epoch, done in _tracked(config, epochs) if leads else epochs:
        valid = epoch.valid.means() if epoch.valid else {}
        if epoch.best:
            metrics = {"epoch": epoch.number, "valid": valid, "users": epoch.valid.users if epoch.valid else 0}
        if leads:
            _say(config.run_dir, epoch, valid)
        report = {
            "epoch": epoch.number,
            "last": epoch.last,
            "placement": group.id.hex() if group else None,
            **{f"valid/{name}": value for name, value in valid.items()},
        }
        if done and model.text is not None:
            model.text.gather(wanted=leads)
        if not (done and leads):  # every rank reports equally often: report is a barrier
            if done or settings["heard"]:  # else not: a report waits up to two seconds for Ray's controller
                ray.train.report(report)
            continue
        with tempfile.TemporaryDirectory() as folder:
            vectors = ranking.catalogue(model)[1]
            told = {"seed": config.seed, "init": config.train.init}
            users = datasets.users(config)  # with test events, which are for serving; training never saw them
            target, seen = Path(folder) / "checkpoint", reference(model, shards, config)
            checkpoint.save(target, model, data, vectors, {**metrics, **told}, users, seen)
            ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(str(target)))


def _new_model(config: Config, data: checkpoint.Data, shards: Shards, before: int = VALID) -> MVRec:
    if config.train.init == "pretrained":
        return pretrained.load(config.run_dir / "pretrained", config, data, shards, before)
    return checkpoint.new_model(config, data, shards, before)


def _epochs(
    config: Config, data: checkpoint.Data, shards: Shards, workers: Workers
) -> Iterator[tuple[MVRec, training.Epoch, bool]]:
    """Each epoch, and whether training is done; then the model is the one to keep: the best of validation, or the one
    that was trained anew with the validation events for as many epochs. Its scores are calibrated on validation."""
    model = _new_model(config, data, shards)
    chosen, steps, scaling = 0, 0, Scaling()
    for epoch in training.fit(model, shards, config, workers, states=_states(config, "choice")):
        chosen, steps = epoch.number if epoch.best else chosen, epoch.step
        if epoch.last:
            scaling = training.calibrate(model, shards, config, workers)
        yield model, epoch, epoch.last and not config.train.refit
    if config.train.refit:
        model = _new_model(config, data, shards, before=TEST)
        for epoch in training.fit(model, shards, config, workers, chosen, _states(config, "refit")):
            if epoch.last:
                model.rescale(scaling)
            yield model, replace(epoch, step=steps + epoch.step), epoch.last


def _tracked(
    config: Config, epochs: Iterator[tuple[MVRec, training.Epoch, bool]]
) -> Iterator[tuple[MVRec, training.Epoch, bool]]:
    """The same epochs, whose figures go to the trackers, but for those that were told before a kill."""
    with contextlib.ExitStack() as stack:
        track, begin = None, 0
        for model, epoch, done in epochs:
            if not epoch.again:
                track = track or stack.enter_context(trackers.tracking(config, begin, partial(_tell, config.run_dir)))
                track(epoch.step, trackers.figures(epoch))
            begin = epoch.step
            yield model, epoch, done


def _states(config: Config, phase: str) -> States:
    return States(config.run_dir / RESUME / phase, _digest(config), config.train.keep, partial(_tell, config.run_dir))


def _digest(config: Config) -> str:
    """Of all that the weights follow from. How many workers there are changes them, but a run may go on with others."""
    tree = config.model_dump(mode="json", include={"seed", "views", "model", "train", "evaluate"})
    for key in ("workers", "shard_text", "threads", "device", "save_steps", "keep", "max_failures", "trackers"):
        del tree["train"][key]
    tree["evaluate"] = config.evaluate.exclude_seen
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for part in ("prepared", *(["pretrained"] if config.train.init == "pretrained" else [])):
        digest.update((config.run_dir / part / "manifest.json").read_bytes())
    return digest.hexdigest()


def _tell(run: Path, line: str) -> None:
    with progress(run, "train").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _say(run: Path, epoch: training.Epoch, valid: dict[str, float]) -> None:
    point = {
        "epoch": epoch.number,
        "refit": epoch.refit,
        "loss": epoch.loss,
        "seconds": epoch.seconds,
        "best": epoch.best,
        "valid": valid,
    }
    with (run / CURVES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(point) + "\n")
    shown = "  ".join(f"{name} {valid[name]:.4f}" for name in SHOWN if name in valid)
    told = f"valid {shown}" if shown else "with validation events" if epoch.refit else ""
    mark = "  best so far" if epoch.best else ""
    _tell(run, f"epoch {epoch.number:3d}/{epoch.of}  loss {epoch.loss:.4f}  {told}  {epoch.seconds:.1f} s{mark}")


@contextlib.contextmanager
def _shown(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Logs the lines that are appended to a new file meanwhile."""
    path.write_text("", encoding="utf-8")
    done = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8") as file:
            while True:
                ending = done.is_set()
                for line in file:
                    log(line.rstrip("\n"))
                if ending:
                    return
                done.wait(0.5)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    from pipelines.cli import run_verb

    run_verb("train")
