"""Does the reward teach? The quickstart on seeded re-splits, with its two controls.

Each seed makes its own re-split, model and order. Beside SFT and GRPO: SFT for as long as GRPO took,
and GRPO with its rewards permuted over the batch. Test rows are pooled over seeds.

    python3 benchmarks/quickstart.py --seeds 1 2 3 4
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rows

RUNS = {"sft_acc": "sft", "rl_acc": "rl", "sft_long_acc": "sft_long", "rl_shuffled_acc": "rl_shuffled"}


def run_seed(seed: int, folder: Path, threads: int | None) -> dict[str, Any]:
    """All runs of one seed; reports of the test split by row name, and the quickstart's own seconds.

    A seed whose log is complete is read, not run again.
    """
    env = os.environ | {"SEED": str(seed), "RESPLIT": str(seed), "CONTROLS": "True", "RUN_DIR": str(folder)}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not log.exists() or not log.read_text().splitlines()[-1].startswith("quickstart:"):
        with log.open("w") as out:
            subprocess.run(
                ["bash", "example/quickstart.sh"], cwd=rows.ROOT, env=env, stdout=out, stderr=out, check=True
            )
    last = log.read_text().splitlines()[-1]
    print(f"seed {seed}: {last}", flush=True)
    found: dict[str, Any] = {"seconds": int(re.search(r"seconds=(\d+)", last)[1])}
    for name, run in RUNS.items():
        (found[name],) = json.loads((folder / run / "reports" / "test.json").read_text())["reports"].values()
    return found


def main() -> None:
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
    parameters = _parameters(args.folder / f"seed_{args.seeds[0]}" / "tiny")
    made = []
    for name in RUNS:
        accuracies = [found[name]["accuracy"] for found in seeds.values()]
        error = statistics.mean(a * (1 - a) for a in accuracies) ** 0.5 / test_rows**0.5
        each = ", ".join(f"{a:.3f}" for a in accuracies)
        made.append(
            rows.BenchmarkRow(
                row=name,
                workload="quickstart (BasicMotions)",
                parameters=parameters,
                samples=test_rows,
                value=statistics.mean(accuracies),
                unit="accuracy",
                mode=f"seeds {each}; median {statistics.median(accuracies):.3f}; standard error {error:.3f}",
            )
        )
    majority = statistics.mean(found["rl_acc"]["majority_share"] for found in seeds.values())
    seconds = statistics.median(found["seconds"] for found in seeds.values())
    made.append(
        rows.BenchmarkRow(row="majority", workload="quickstart (BasicMotions)", value=majority, unit="accuracy")
    )
    made.append(
        rows.BenchmarkRow(
            row="quickstart_s",
            workload="quickstart (BasicMotions)",
            value=seconds,
            unit="s",
            mode="median; without installation and controls",
        )
    )
    rows.write("quickstart", made)


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="numpy") as file:
        return sum(int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118 - not a dict


if __name__ == "__main__":
    main()
