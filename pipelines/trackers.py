"""Where a training run's figures go: TensorBoard, Weights & Biases, MLflow, as `train.trackers` names them.

Each tracker runs in a thread of its own on the worker of rank 0, with <run>/tracking/<tracker> for its files, so that
a disk or a network that fails, or is slow, costs that tracker and never the training. Credentials and addresses come
from the environment, as the trackers' own tools read them (WANDB_MODE, WANDB_API_KEY, WANDB_PROJECT;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_ID).

The figures, by the same names everywhere, against the step of the optimiser; of a refit with "refit/" before the name:

loss  learning_rate  targets_per_second  padding  gradient_norm  epoch
weights/<view>  valid/<metric>, where NDCG@10 is NDCG_10, as neither TensorBoard nor MLflow takes an @
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mvrec_core.config import Config
from mvrec_core.errors import ConfigError
from mvrec_core.training import Epoch

Points = Iterator[tuple[int, Mapping[str, float]]]  # step, figures

PATIENCE_S = 60.0  # for what is left to be written when training is done
RUN = "run_id"  # the file that keeps a run's name at a tracker


class Stopped(Exception):
    """Training failed or was stopped: reaches a tracker in place of the next point."""


def check(config: Config) -> None:
    """Raises ConfigError where a tracker is named that is not installed."""
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers: '{name}' is not installed; pip install 'mvrec[{name}]'")


def figures(epoch: Epoch) -> dict[str, float]:
    """What an epoch gave, by the names that all trackers use."""
    found = {
        "loss": epoch.loss,
        "learning_rate": epoch.lr,
        "targets_per_second": epoch.throughput,
        "padding": epoch.padding,
        "gradient_norm": epoch.gradient_norm,
        "epoch": float(epoch.number),
        **{f"weights/{view}": weight for view, weight in (epoch.view_weights or {}).items()},
        **{f"valid/{name.replace('@', '_')}": v for name, v in (epoch.valid.means() if epoch.valid else {}).items()},
    }
    return {f"refit/{name}": value for name, value in found.items()} if epoch.refit else found


@contextlib.contextmanager
def tracking(
    config: Config, begin: int, say: Callable[[str], None], patience_s: float = PATIENCE_S
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields what takes (step, figures), with steps that rise; it never waits, and never raises.

    begin: steps that were done before. 0 is a new run, for which what an earlier one left in <run>/tracking goes.
        Else each tracker goes on in the run that it has.
    say: is told once of a tracker that fails.
    """
    folder = config.run_dir / "tracking"
    if not begin:
        shutil.rmtree(folder, ignore_errors=True)
    queues: dict[str, SimpleQueue[Any]] = {name: SimpleQueue() for name in config.train.trackers}
    threads = {
        name: threading.Thread(
            target=_follow, args=(name, config, folder / name, begin, _points(queue), say), name=name, daemon=True
        )
        for name, queue in queues.items()
    }
    for thread in threads.values():
        thread.start()

    def put(point: Any) -> None:
        for queue in queues.values():
            queue.put(point)

    try:
        yield lambda step, values: put((step, values))
    except BaseException:
        put(Stopped())
        raise
    finally:
        put(None)
        until = time.monotonic() + patience_s
        for name, thread in threads.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                say(f"{name}: has not taken all figures within {patience_s:g} s; going on without it")


def _points(queue: SimpleQueue[Any]) -> Points:
    while (point := queue.get()) is not None:
        if isinstance(point, Stopped):
            raise point
        yield point


def _follow(name: str, config: Config, folder: Path, begin: int, points: Points, say: Callable[[str], None]) -> None:
    write = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(config, folder.absolute(), begin, points)
    except Stopped:
        pass
    except Exception as error:  # whatever it is, training is worth more
        told = str(error).strip().splitlines() or [type(error).__name__]
        say(f"{name}: {told[0]}; going on without it")


def _tensorboard(config: Config, folder: Path, begin: int, points: Points) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=begin + 1 if begin else None) as writer:
        for step, values in points:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()


def _wandb(config: Config, folder: Path, begin: int, points: Points) -> None:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "mvrec"),
        name=config.name,
        id=_kept(folder, lambda: uuid.uuid4().hex[:8]),
        resume="allow",
        dir=str(folder),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    with run:
        for step, values in points:
            run.log(dict(values), step=step)


def _mlflow(config: Config, folder: Path, begin: int, points: Points) -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"))

    def start() -> str:
        run = client.create_run(os.environ.get("MLFLOW_EXPERIMENT_ID", "0"), run_name=config.name).info.run_id
        sections = config.model_dump(mode="json", include={"seed", "model", "train"})
        client.log_batch(run, params=[Param(name, str(value)) for name, value in _leaves(sections)])
        return run

    run = _kept(folder, start)
    client.update_run(run, status="RUNNING")
    try:
        for step, values in points:
            now = int(time.time() * 1000)
            client.log_batch(run, [Metric(name, value, now, step) for name, value in values.items()])
    except Stopped:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run)


def _kept(folder: Path, make: Callable[[], str]) -> str:
    """A run's name at a tracker: that of an earlier start, else a new one, which is kept in the folder."""
    path = folder / RUN
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and key != "values":  # those of train.weights have keys of their own
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
