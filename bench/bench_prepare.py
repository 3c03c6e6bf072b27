"""`prepare` beside Polars, DuckDB and pandas: the same log, the same per-user lists, the same two cores, in one run.

    python bench/bench_prepare.py --events 20_000_000 --json out.json     seconds, ratios and peak memory
    python bench/bench_prepare.py --scale 5,10,20,50                      ours alone at so many millions of events
    python bench/bench_prepare.py --events 1_000_000 --cpus 1,2,4         one content hash however the log is read?
    python bench/bench_prepare.py --events 1_000_000 --cli                `mvrec prepare` on a CSV, Ray's start included

The log: Zipf items, users some of whom are far more active than others, one year in time order with jitter, ids as
text, 0.1% of the rows without an id or a usable timestamp. It is written once, as Parquet with zstd, and used again.

Each contestant is a process of its own. The start of processes and their imports are outside the clock, those of Ray
and its workers too; only `--cli` has everything inside. A contestant turns the files into one row a user: user_id and
the lists item and timestamp, by timestamp and then by place in the files, in Parquet with zstd, without the unusable
rows; in which order the users come is its own affair. Ours gives the reason of each unusable row, splits, and writes
the manifest and the report besides, with "lists only" too; "all views" adds the kind of event, its price and its time.

Each peer has the fastest formulation that was found, of those that give these lists exactly:
  polars   sixteen were tried, in memory and streaming; the two that led stay here, and the faster one counts. To group
           by a hash of the user took about 0.9x, but is left out: it makes one of two users whose hashes are equal
  duckdb   list(x ORDER BY timestamp) alone leaves ties in no order, so the place in the files is in the sort key; as a
           sorted list of structs it was faster than that one without the place
  pandas   a stable sort by timestamp, with ids as objects: no sort by user and timestamp, no strings and no categories
           were faster

Memory is the peak of all processes of a contestant together, Ray's included: their proportional set sizes (PSS), and
the object store as it is allocated, since pages of it that no living process maps have no PSS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from contestants import CORES, compete, tree
from synthetic_log import write_csv, write_log

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds that a contestant may take
SAMPLE = 0.2  # seconds between two looks at the memory
COMPARED = 2_000_000  # events up to which all lists of all contestants are compared


@dataclass
class Memory:
    """All processes below one, and the most memory that they ever held together, in bytes."""

    root: int
    peak: int = 0
    seen: dict[int, str] | None = None  # pid -> when it started, so that another with its number is not taken for it

    def look(self) -> None:
        parents: dict[int, list[int]] = {}
        started: dict[int, str] = {}
        names: dict[int, str] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError):
                    head, _, tail = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")
                    fields = tail.split()
                    parents.setdefault(int(fields[1]), []).append(int(entry))
                    started[int(entry)], names[int(entry)] = fields[19], head.partition("(")[2]
        mine = [self.root]
        for pid in mine:
            mine += parents.get(pid, [])
        own, shared, store = 0, 0, 0
        for pid in mine:
            with suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                size = {key: int(text.split()[0]) * 1024 for key, text in (line.split(":") for line in rollup)}
                own += size["Pss"] - size["Pss_Shmem"]
                shared += size["Pss_Shmem"]
                store += _object_store(pid) if names.get(pid) == "raylet" else 0
        self.peak = max(self.peak, own + max(shared, store))
        self.seen = (self.seen or {}) | {pid: started[pid] for pid in mine if pid in started}

    def kill(self) -> None:
        """Ends what is left of them."""
        for pid, start in (self.seen or {}).items():
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19] == start:
                    os.kill(pid, signal.SIGKILL)


def _object_store(pid: int) -> int:
    """Bytes of shared memory that the raylet with this number holds."""
    sizes = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).startswith("/dev/shm/"):
                found = os.stat(entry)
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Runs a command on CORES cores: seconds of the whole process, and peak MB of it and all below it."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.sync()  # what one contestant wrote is not flushed on another's time
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    memory = Memory(process.pid)
    try:
        while process.poll() is None:
            if time.perf_counter() - began > LIMIT:
                raise SystemExit(f"{' '.join(command)}: not done within {LIMIT} s")
            memory.look()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE)
        seconds = time.perf_counter() - began
    finally:
        memory.look()
        memory.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds, memory.peak / 1e6


def run(name: str, source: Path, root: Path, cpus: int = CORES) -> dict[str, Any]:
    """One contestant in a process of its own: seconds, peak_mb and its facts; its files stay in <root>/out/<name>."""
    out, result = root / "out" / name, root / "out" / f"{name}.json"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in source.iterdir():  # into the page cache: nobody pays for the first look
        file.read_bytes()
    arguments = ["--compete", name, "--source", str(source), "--out", str(out), "--ray-cpus", str(cpus)]
    _, peak = measured([sys.executable, str(Path(__file__).resolve()), *arguments, "--result", str(result)])
    report = json.loads(result.read_text()) | {"peak_mb": peak}
    print(f"{name:18} {report['seconds']:8.2f} s {peak:8.0f} MB", flush=True)
    return report


# comparing


def lists(name: str, root: Path) -> Any:
    """user_id, item, timestamp (s) of a contestant's output, ordered by user."""
    import polars as pl

    out = root / "out" / name
    if name not in ("lists", "all"):
        return pl.read_parquet(out / "lists.parquet").sort("user_id")
    events = [pl.read_parquet(file) for part in ("events", "test/events")
              for file in sorted((out / name / "prepared" / part).glob("*/*.parquet"))]  # fmt: skip
    rows = pl.concat(events).select("user_id", "item", pl.col("timestamp").cast(pl.List(pl.Int64)))
    rows = rows.explode("item", "timestamp").drop_nulls("item").with_columns(pl.col("timestamp") // 1_000_000)
    return rows.group_by("user_id", maintain_order=True).agg("item", "timestamp").sort("user_id")


def same_lists(names: Sequence[str], root: Path) -> bool:
    """Whether all of them gave the same lists, user by user."""
    first = lists(names[0], root)
    return all(first.equals(lists(name, root)) for name in names[1:])


def compare(root: Path, events: int, files: int, peers: Sequence[str]) -> dict[str, Any]:
    source = write_log(root, events, files)
    polars = ["polars_sort_group", "polars_group_sort"] if "polars" in peers else []
    names = [*polars, "lists", "all", *[peer for peer in ("duckdb", "pandas") if peer in peers]]
    reports = {name: run(name, source, root) for name in names}
    seconds = {name: report["seconds"] for name, report in reports.items()}
    peaks = {name: round(report["peak_mb"]) for name, report in reports.items()}
    best = min(polars, key=lambda name: seconds[name], default=None)
    equal = same_lists(names, root) if events <= COMPARED else None

    def ratio(ours: str, peer: str | None) -> float | None:
        return round(seconds[ours] / seconds[peer], 3) if peer in seconds else None

    print(f"\n{events:,} events, {files} files, {CORES} cores; Ray started in {reports['lists']['ray_start']:.1f} s")
    print(f"{'':24}{'seconds':>9}{'lists only /':>14}{'all views /':>13}{'peak MB':>9}")
    labels = {
        "lists": "ours, lists only",
        "all": "ours, all views",
        "polars_sort_group": "polars, sort then group",
        "polars_group_sort": "polars, group then sort",
    }
    for name in names:
        ratios = "".join(f"{seconds[ours] / seconds[name]:{width}.2f}" for ours, width in (("lists", 14), ("all", 13)))
        ratios = " " * len(ratios) if name in ("lists", "all") else ratios
        print(f"{labels.get(name, name):24}{seconds[name]:9.2f}{ratios}{peaks[name]:9,}")
    if best:
        print(f"against the faster Polars: lists only {ratio('lists', best)}, all views {ratio('all', best)}")
    if equal is not None:
        print(f"lists of all contestants, user by user: {'equal' if equal else 'DIFFERENT'}")
    rows = reports["all"]["rows"]
    print(f"rows in {rows['in']:,} = kept {rows['kept']:,} + rejected {rows['rejected']:,}")
    return {
        "events": events,
        "ratio_polars": ratio("lists", best),
        "ratio_polars_all_views": ratio("all", best),
        "ratio_duckdb": ratio("lists", "duckdb"),
        "ratio_pandas": ratio("lists", "pandas"),
        "peak_mb": peaks["lists"],
        "peak_mb_all_views": peaks["all"],
        "content_hash": reports["all"]["content_hash"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peaks_mb": peaks,
        "rows": rows,
        "equal": equal,
    }


def scale(root: Path, sizes: Sequence[int], files: int) -> dict[str, Any]:
    """Ours at each of the sizes: the exponent of time by events, and how the peak of memory grows."""
    reports: dict[str, list[dict[str, Any]]] = {"lists": [], "all": []}
    for events in sizes:
        source = write_log(root, events, files)
        for name in reports:
            print(f"{events:12,} ", end="")
            reports[name].append(run(name, source, root))
    result: dict[str, Any] = {"events": list(sizes)}
    for name, label in (("lists", "lists only"), ("all", "all views")):
        seconds = [report["seconds"] for report in reports[name]]
        peaks = [report["peak_mb"] for report in reports[name]]
        fit = statistics.linear_regression([log(events) for events in sizes], [log(value) for value in seconds])
        growth = peaks[-1] / peaks[0]
        print(f"{label}: time grows with events to the power of {fit.slope:.3f}, memory {growth:.2f}x over the sizes")
        result[name] = {"seconds": seconds, "peak_mb": peaks, "exponent": fit.slope, "peak_growth": growth}
    return result


def same_hash(root: Path, events: int, cpus: Sequence[int]) -> dict[str, Any]:
    """The content hash with each number of Ray CPUs, from one file and from 50, and from a second run."""
    runs = [(cpu, files) for files in (1, 50) for cpu in cpus]
    runs.append(runs[0])
    hashes = [run("all", write_log(root, events, files), root, cpu)["content_hash"] for cpu, files in runs]
    for (cpu, files), found in zip(runs, hashes, strict=True):
        print(f"{cpu} Ray CPU(s), {files:2} file(s): {found}")
    equal = len(set(hashes)) == 1
    print(f"content hashes: {'all equal' if equal else 'DIFFERENT'}")
    return {"events": events, "equal": equal, "content_hash": hashes[0]}


def command_line(root: Path, events: int) -> dict[str, Any]:
    """`mvrec prepare` with all views on a CSV file: process start, imports and Ray's start included."""
    out = root / "out" / "cli"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = out / "config.yaml"
    config.write_text(json.dumps(tree("all", write_csv(root, events), out, all_views=True)))  # JSON is YAML
    seconds, peak = measured([sys.executable, "-m", "pipelines.cli", "prepare", "-c", str(config)])
    print(f"mvrec prepare, {events:,} events of a CSV file: {seconds:.1f} s, {peak:,.0f} MB")
    return {"events": events, "seconds": round(seconds, 2), "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "bench-prepare", help="of the log and the output")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--peers", default="polars,duckdb,pandas", type=lambda text: text.split(","))
    parser.add_argument("--scale", type=lambda text: [round(float(size) * 1e6) for size in text.split(",")])
    parser.add_argument("--cpus", type=lambda text: [int(cpus) for cpus in text.split(",")])
    parser.add_argument("--cli", action="store_true")
    for name in ("compete", "source", "out", "ray-cpus", "result"):  # from this script to its own processes
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compete:
        compete(given.compete, Path(given.source), Path(given.out), int(given.ray_cpus), Path(given.result))
        return
    if unknown := set(given.peers) - {"polars", "duckdb", "pandas"}:
        parser.error(f"--peers: expected some of polars, duckdb, pandas, found {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes below end too
    root = given.dir.absolute()
    try:
        if given.scale:
            report = scale(root, given.scale, given.files)
        elif given.cpus:
            report = same_hash(root, given.events, given.cpus)
        elif given.cli:
            report = command_line(root, given.events)
        else:
            report = compare(root, given.events, given.files, given.peers)
    finally:
        shutil.rmtree(root / "out", ignore_errors=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    if report.get("equal") is False:
        sys.exit(1)


if __name__ == "__main__":
    main()
