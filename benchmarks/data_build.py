"""Time and memory of the data step: each task from its raw archive, and 10,000 series of 1,500 points drawn.

RCW, whose archive is too large to bring along, is built from a made-up one of 1,000 clips in its format.

    python3 benchmarks/data_build.py [--archives ../shared/data] [--series 10000] [--workers 2]

Nothing is cached between builds. CPU seconds are of all processes together; where they are far below what the wall time
times the cores allows, the machine was busy with something else. Memory is of the largest single process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rows

from verl.timeseries import get_task
from verl.timeseries.plot import draw_all

FOLDERS = {
    "ctu": "ucr/Computers",
    "tee": "ucr/Lightning7",
    "emg": "physionet_emgdb",
    "har": "uci_har",
    "ecg": "cinc2017",
}
AIM_S = 120.0
CLIPS = {"TRAIN": 850, "TEST": 150}
TIMED = ("draw", *FOLDERS, "rcw")


@dataclass(frozen=True)
class Cost:
    """What a process and its children took."""

    seconds: float
    cpu_s: float
    peak_mb: float
    load: float
    """Load average of the machine at the start: processes that wanted a core."""


def run(command: Sequence[str]) -> Cost:
    """Raises RuntimeError when the command fails."""
    load, started = os.getloadavg()[0], time.perf_counter()
    child = os.posix_spawnp(command[0], list(command), {**os.environ, "PYTHONPATH": str(rows.ROOT)})
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, load)


def draw(count: int, workers: int) -> int:
    """Draw random walks in ECG's style; returns the bytes of all plots."""
    style = get_task("ecg").plot
    steps = np.random.default_rng(0).normal(size=(count, 1, 1500))
    return sum(len(png) for png in draw_all(list(steps.cumsum(axis=2)), style, workers=workers))


def write_clips(folder: Path) -> Path:
    """RightWhaleCalls in the archive's .arff format: noise of 4,000 points at 2 kHz, half of it with a rising tone."""
    folder.mkdir(parents=True)
    rng, seconds = np.random.default_rng(0), np.arange(4000) / 2000
    tone = np.sin(2 * np.pi * (60 * seconds + 45 * seconds**2))
    head = "@relation RightWhaleCalls\n" + "".join(f"@attribute att{i} numeric\n" for i in range(len(tone)))
    head += "@attribute target {NoWhale,RightWhale}\n@data\n"
    for split, count in CLIPS.items():
        with (folder / f"RightWhaleCalls_{split}.arff").open("w") as file:
            file.write(head)
            for row in range(count):
                values = rng.normal(size=len(tone)) + tone * (row % 2)
                file.write(",".join(f"{v:.4f}" for v in values) + f",{('NoWhale', 'RightWhale')[row % 2]}\n")
    return folder


def row_of(name: str, workload: str, cost: Cost, samples: int, note: str = "") -> rows.BenchmarkRow:
    return rows.BenchmarkRow(
        row=name,
        workload=workload,
        value=cost.seconds,
        unit="s",
        samples=samples,
        mode=f"{note}{cost.cpu_s:.1f} CPU s, {cost.peak_mb:.0f} MB, load before {cost.load:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, default=rows.ROOT.parent / "shared" / "data")
    parser.add_argument("--series", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=TIMED, choices=TIMED)
    parser.add_argument("--only-draw", action="store_true", help="used by the script itself")
    args = parser.parse_args()
    if args.only_draw:
        draw(args.series, args.workers)
        return
    if "draw" in args.rows:
        again = [sys.executable, __file__, "--only-draw", f"--series={args.series}", f"--workers={args.workers}"]
        cost = run(again)
        note = f"aim {AIM_S:.0f} s on 2 idle cores; {1e3 * cost.cpu_s / args.series:.1f} CPU ms a plot; "
        workload = f"{args.series:,} series of 1,500 points, {args.workers} workers"
        keep(row_of("draw", workload, cost, args.series, note))
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in FOLDERS.items():
            if name in args.rows:
                build(name, args.archives / folder, Path(scratch, name), args.workers)
        if "rcw" in args.rows:
            build("rcw", write_clips(Path(scratch, "clips")), Path(scratch, "rcw"), args.workers, archive="made-up")


def build(name: str, source: Path, output: Path, workers: int, *, archive: str = "raw") -> None:
    if not source.is_dir():
        print(f"{name}: no archive at {source}; left out", flush=True)
        return
    options = [f"task={name}", f"source={source}", f"output={output}", "cache=null", f"workers={workers}"]
    cost = run([sys.executable, "-m", "verl.timeseries.build", *options])
    plots = sum(1 for _ in output.glob("images/*/*.png"))
    keep(row_of(f"build {name}", f"{archive} archive to plots and parquet, {workers} workers", cost, plots))


def keep(row: rows.BenchmarkRow) -> None:
    """Rows of other runs stay."""
    print(f"{row.row}: {row.value:.1f} s, {row.mode}", flush=True)
    rows.write("data_build", [row], show=False, append=True)


if __name__ == "__main__":
    main()
