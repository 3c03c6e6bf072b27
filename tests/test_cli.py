from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny

from pipelines.cli import main

ROOT = Path(__file__).parent.parent


def mvrec(*arguments, **environment):
    """Exit code, lines of stdout, lines of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment,
        capture_output=True,
        timeout=400,
    )
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


def paths(logs, runs):
    return [f"runs={runs}", *(f"data.{name}.path={logs / name}.csv" for name in ("events", "items", "users"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-c", "no-such.yaml"], "no-such.yaml: no such configuration file"),
        (["train", "-c", tiny.CONFIG, "train.epoch=3"], f"{tiny.CONFIG}: unknown key 'train.epoch'; did you mean"),
        (["prepare", "-c", tiny.CONFIG, "data.events.path=gone.csv"], "data.events.path: no such file: 'gone.csv'"),
        (["evaluate", "--checkpoint", "no-such"], "no-such: no such checkpoint directory"),
        (["evaluate"], "evaluate needs --config FILE or --checkpoint DIR"),
        (["evaluate", "--checkpoint", "no-such", "--against", "other"], "no-such: no such checkpoint directory"),
        (["evaluate", "--checkpoint", "a", "--against", "b", "--beside", "c"], "evaluate: expected --against or"),
        (["evaluate", "--against", "no-such"], "evaluate needs --config FILE or --checkpoint DIR"),
        (["evaluate", "-c", tiny.CONFIG, "evaluate.als.factor=3"], f"{tiny.CONFIG}: unknown key 'evaluate.als.factor'"),
        (["evaluate", "--checkpoint", "no-such", "evaluate.batch_size=8"], "evaluate: section.key=value needs"),
        (["evaluate", "-c", tiny.CONFIG, "evaluate.baselines=[pop]"], f"{tiny.CONFIG}: key 'evaluate.baselines.0': "),
        (["recommend", "--checkpoint", "no-such", "--out", "x.parquet"], "no-such: no such checkpoint directory"),
        (["recommend", "--checkpoint", "x", "--out", "y", "--stage", "test", "--now", "x"], "--now: expected with"),
        (["recommend", "--checkpoint", "x", "--out", "y", "--now", "soon"], "--now: expected an ISO-8601 instant"),
        (["train", "-c", tiny.CONFIG, "runs=/no/where"], "/no/where/tiny/prepared: no prepared data"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, message):
    code, out, err = mvrec(*arguments)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(f"error: {message}")


def test_a_path_in_another_script(tmp_path):
    code, _, err = mvrec("train", "-c", "流浪地球.yaml", LC_ALL="C")
    assert (code, err) == (1, ["error: 流浪地球.yaml: no such configuration file"])


def test_python_m_of_a_verb():
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", "-c", "no-such.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: no-such.yaml: no such configuration file\n")


@pytest.mark.ray
def test_titles_in_the_poorest_locale(tiny_logs, tmp_path):
    poorest = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = mvrec("prepare", "-c", tiny.CONFIG, *paths(tiny_logs, tmp_path), **poorest)
    assert (code, err) == (0, [])
    assert out[-1].startswith(f"prepare: wrote {tmp_path / 'tiny' / 'prepared'} in ")
    titles = pq.read_table(tmp_path / "tiny" / "prepared" / "items" / "display.parquet")["value"].to_pylist()
    assert titles[:2] == ["流浪地球", "قصة لعبة"]


@pytest.mark.ray
def test_a_log_without_a_good_row_is_one_line(ray_local, tiny_logs, tmp_path, capsys):
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,rating\n安,流浪地球,soon,5\n", encoding="utf-8")
    log = f"data.events.path={tmp_path / 'events.csv'}"
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "-c", str(tiny.CONFIG), *paths(tiny_logs, tmp_path), log])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (1, 1)
    assert err.startswith("error: data.events: all 1 rows were rejected; the first is row 1 of ")
    assert "timestamp is not a number" in err and "流浪地球" in err
    assert not (tmp_path / "tiny" / "prepared").exists()
