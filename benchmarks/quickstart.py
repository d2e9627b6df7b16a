"""Does the reward teach? The quickstart on seeded re-splits, with its two controls.

Each seed makes its own re-split, model and order. Beside SFT and GRPO: SFT for as long as GRPO took,
and GRPO with its rewards permuted over the batch. Test rows are pooled over seeds. Ends with exit code 1
where the claims of `missed` do not hold.

    python3 benchmarks/quickstart.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rows
from stored import stored

RUNS = {"sft_acc": "sft", "rl_acc": "rl", "sft_long_acc": "sft_long", "rl_shuffled_acc": "rl_shuffled"}
WORKLOAD = "quickstart (BasicMotions)"
LEAST_ROWS = 150


def run_seed(seed: int, folder: Path, threads: int | None) -> dict[str, Any]:
    """All runs of one seed: reports of the test split by row name, and the quickstart's own seconds."""
    settings = {"SEED": str(seed), "RESPLIT": str(seed), "CONTROLS": "True", "RUN_DIR": str(folder)}
    if threads is not None:
        settings["OMP_NUM_THREADS"] = str(threads)
    found = stored(folder / "result.json", settings, lambda: _quickstart(settings, folder))
    print(f"seed {seed}: {found['last_line']}", flush=True)
    return found


def _quickstart(settings: Mapping[str, str], folder: Path) -> dict[str, Any]:
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command = ["bash", "example/quickstart.sh"]
        subprocess.run(command, cwd=rows.ROOT, env=os.environ | settings, stdout=out, stderr=out, check=True)
    last = log.read_text().splitlines()[-1]
    found: dict[str, Any] = {"last_line": last, "seconds": int(re.search(r"seconds=(\d+)", last)[1])}
    for name, run in RUNS.items():
        (found[name],) = json.loads((folder / run / "reports" / "test.json").read_text())["reports"].values()
    found["parameters"] = rows.parameters_of(folder / "tiny")
    return found


def missed(accuracy: Mapping[str, Sequence[float]], majority: float, test_rows: int) -> list[str]:
    """Which of the quickstart's claims these accuracies (one a seed) do not bear out.

    The median gain of GRPO over its start is 0.10 and over the majority class 0.25; permuted rewards leave the start
    within one standard error of its mean; there are test rows enough for that.
    """
    median = {name: statistics.median(values) for name, values in accuracy.items()}
    start, shuffled = statistics.mean(accuracy["sft_acc"]), statistics.mean(accuracy["rl_shuffled_acc"])
    error = standard_error(accuracy["sft_acc"], test_rows)
    found = []
    if median["rl_acc"] - median["sft_acc"] < 0.10:
        found.append(f"median rl_acc {median['rl_acc']:.3f} is less than 0.10 above sft_acc {median['sft_acc']:.3f}")
    if median["rl_acc"] - majority < 0.25:
        found.append(f"median rl_acc {median['rl_acc']:.3f} is less than 0.25 above majority {majority:.3f}")
    if abs(shuffled - start) > error:
        found.append(f"rl_shuffled_acc {shuffled:.3f} is not within {error:.3f} of sft_acc {start:.3f}")
    if test_rows < LEAST_ROWS:
        found.append(f"{test_rows} test rows, {LEAST_ROWS} are needed")
    return found


def standard_error(accuracies: Sequence[float], test_rows: int) -> float:
    """Of the mean accuracy: binomial, over the pooled rows."""
    return (statistics.mean(a * (1 - a) for a in accuracies) / test_rows) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=rows.ROOT / "checkpoints" / "quickstart_benchmark")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each on its share of the cores")
    args = parser.parse_args()
    threads = None if args.jobs == 1 else max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda seed: run_seed(seed, args.folder / f"seed_{seed}", threads), args.seeds)
        seeds = dict(zip(args.seeds, found, strict=True))
    test_rows = sum(found["rl_acc"]["n_prompts"] for found in seeds.values())
    accuracy = {name: [found[name]["accuracy"] for found in seeds.values()] for name in RUNS}
    parameters = next(iter(seeds.values()))["parameters"]
    made = [_accuracy_row(name, values, test_rows, parameters) for name, values in accuracy.items()]
    majority = statistics.mean(found["rl_acc"]["majority_share"] for found in seeds.values())
    made.append(rows.BenchmarkRow(row="majority", workload=WORKLOAD, value=majority, unit="accuracy"))
    seconds = statistics.median(found["seconds"] for found in seeds.values())
    mode = "median; without installation and controls"
    made.append(rows.BenchmarkRow(row="quickstart_s", workload=WORKLOAD, value=seconds, unit="s", mode=mode))
    rows.write("quickstart", made)
    claims = missed(accuracy, majority, test_rows)
    for claim in claims:
        print(f"missed: {claim}", file=sys.stderr)
    return 1 if claims else 0


def _accuracy_row(name: str, accuracies: Sequence[float], test_rows: int, parameters: int) -> rows.BenchmarkRow:
    each = ", ".join(f"{a:.3f}" for a in accuracies)
    error = standard_error(accuracies, test_rows)
    return rows.BenchmarkRow(
        row=name,
        workload=WORKLOAD,
        parameters=parameters,
        samples=test_rows,
        value=statistics.mean(accuracies),
        unit="accuracy",
        mode=f"seeds {each}; median {statistics.median(accuracies):.3f}; standard error {error:.3f}",
    )


if __name__ == "__main__":
    sys.exit(main())
