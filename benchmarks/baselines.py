"""Majority, 1-NN and ROCKET-type baselines of every task whose archive is at hand, on the split that training uses.

    python3 benchmarks/baselines.py [--archives ../shared/data] [--seeds 1 2 3] [--tasks ctu tee]

Looks for the archives' folders under --archives; rows of tasks and baselines that are not asked for stay as they are.
Each is written as it comes. ROCKET (10,000 kernels) takes from half a minute to minutes a seed, and for ECG and RCW,
with thousands of long series, far longer; `--baselines majority 1-NN MiniRocket` leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows

from verl.timeseries import get_task
from verl.timeseries.baselines import BASELINES, RANDOM, BaselineScore, score, table

FOLDERS = {
    "ctu": "ucr/Computers",
    "tee": "ucr/Lightning7",
    "emg": "physionet_emgdb",
    "har": "uci_har",
    "ecg": "cinc2017",
    "rcw": "ucr/RightWhaleCalls",
}


def row_of(found: BaselineScore, seeds: list[int]) -> rows.BenchmarkRow:
    by_seed = ", ".join(f"{value:.4f}" for value in found.accuracies)
    mode = f"seeds {seeds}: {by_seed}; " if found.baseline in RANDOM else ""
    return rows.BenchmarkRow(
        row=f"{found.task} {found.baseline}",
        workload="official split" if found.task in ("ctu", "tee") else "split of the data step",
        value=found.accuracy,
        unit="accuracy",
        samples=found.n,
        mode=f"{mode}standard error (Wilson) {found.standard_error:.4f}; macro-F1 {found.macro_f1:.4f}; "
        f"{found.seconds:.1f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, default=rows.ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=list(BASELINES))
    args = parser.parse_args()
    found: list[BaselineScore] = []
    for name in args.tasks:
        source = args.archives / FOLDERS[name]
        if not source.is_dir():
            print(f"{name}: no archive at {source}; left out", flush=True)
            continue
        task = get_task(name)
        archive = task.reader.read(source, task)
        for baseline in args.baselines:
            found.append(score(task, archive, baseline, args.seeds))
            print(f"{name} {baseline}: {found[-1].accuracy:.4f} in {found[-1].seconds:.1f} s a seed", flush=True)
            rows.write("baselines", [row_of(found[-1], args.seeds)], show=False, append=True)
    print(table(found))


if __name__ == "__main__":
    main()
