"""Does a model trained from nothing learn the tasks? SFT, then GRPO, per task and seed, on the untouched test split.

Every run makes a random Qwen2.5-VL of a few million parameters, trains it on the supervised answers for a fixed number
of steps (with `--stop-parse-failure 0.02`: until fewer than 2 % of its validation answers are malformed, a rule that
does not look at accuracy), and goes on with GRPO. With `--sft-share 0.25` SFT is a cold start on a quarter of the rows,
while GRPO sees them all: a label costs less than a written answer. Limits of prompts and answers follow from the data.
Reported are the test accuracy and macro-F1 before and after GRPO, and whether the training reward rose: mean of the
last ten steps minus the first ten, in standard errors of the steps. `curves/learning.json` holds every step's mean
reward.

    python3 benchmarks/learning.py --tasks ctu har --seeds 1 2 3 --engine hf --jobs 6
    python3 benchmarks/learning.py --tasks basic_motions --engine hf vllm      # and McNemar's test between the two

The data folders (`data/<task>_<modality>`) must be there: see example/data_preprocess.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import rows
from recipe import STARTS, Limits, Recipe, Run, rl_command, sft_command
from scipy.stats import binomtest
from stored import stored

from verl.timeseries.tasks import get_task

_EDGE = 10  # steps at each end of the reward curve that are compared


def _call(command: Sequence[str], log: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(rows.ROOT), env.get("PYTHONPATH"))))
    with log.open("a") as out:
        code = subprocess.run(command, cwd=rows.ROOT, env=env, stdout=out, stderr=out, check=False).returncode
    if code:
        raise RuntimeError(f"{log}: exit code {code}\n" + "\n".join(log.read_text().splitlines()[-15:]))


def train(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Both stages; a run that this tree and recipe made is read, not run again."""
    folder = run.folder(recipe)
    settings = {"run": asdict(run), "recipe": {name: str(value) for name, value in asdict(recipe).items()}}
    found = stored(folder / "result.json", settings, lambda: _train(run, recipe, folder))
    print(
        f"{run.task} seed {run.seed} {run.engine}: majority {found['majority']:.3f} sft {found['sft_acc']:.3f} "
        f"rl {found['rl_acc']:.3f} f1 {found['sft_f1']:.3f} -> {found['rl_f1']:.3f} "
        f"({found['sft_seconds']:.0f} s + {found['rl_seconds']:.0f} s)",
        flush=True,
    )
    return found


def _train(run: Run, recipe: Recipe, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    begin = time.monotonic()
    texts = recipe.data / f"{run.task}_{recipe.modality}" / "sft_fit.parquet"
    size = ["--hidden", str(recipe.hidden), "--layers", str(recipe.layers)]
    made = [
        *("--output", str(folder / "tiny"), "--texts", str(texts), "--seed", str(run.seed)),
        *STARTS[recipe.start][0],
        *size,
    ]
    _call([sys.executable, "-m", "verl.models.tiny", *made], log)
    limits = Limits.of(folder / "tiny", texts.parent)
    _call(sft_command(run, recipe, limits), log)
    middle = time.monotonic()
    _call(rl_command(run, recipe, limits), log)
    return _read(folder) | {"sft_seconds": middle - begin, "rl_seconds": time.monotonic() - middle}


def _report(run: Path) -> dict[str, Any]:
    (report,) = json.loads((run / "reports" / "test.json").read_text())["reports"].values()
    return dict(report)


def _read(folder: Path) -> dict[str, Any]:
    """What the two stages left behind: accuracies, the reward curve, and which test rows are right."""
    sft, rl = _report(folder / "sft"), _report(folder / "rl")
    lines = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "critic/rewards/mean" in line]
    answers = [json.loads(line) for line in (folder / "rl" / "validation" / "test.jsonl").read_text().splitlines()]
    config = json.loads((folder / "tiny" / "tiny.json").read_text())
    return {
        "n": rl["n_prompts"],
        "majority": rl["majority_share"],
        "sft_acc": sft["accuracy"],
        "sft_f1": sft["classification"]["macro_f1"],
        "rl_acc": rl["accuracy"],
        "rl_f1": rl["classification"]["macro_f1"],
        "parse_failure": rl["classification"]["parse_failure_rate"],
        "rewards": [step["critic/rewards/mean"] for step in steps],
        "step_seconds": statistics.median(step["timing_s/step"] for step in steps),
        "prompt_tokens": statistics.mean(step["prompt_length/mean"] for step in steps),
        "right": {a["uid"]: a["answers"][0]["prediction"] == a["ground_truth"] for a in answers},
        "size": config,
    }


def reward_gain(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over seeds of (last ten steps - first ten steps), and its standard error from the steps' spread.

    The error is that of a difference of two means over `_EDGE` steps each, combined over independent seeds.
    """
    gains = [statistics.mean(c[-_EDGE:]) - statistics.mean(c[:_EDGE]) for c in curves]
    variances = [(statistics.variance(c[-_EDGE:]) + statistics.variance(c[:_EDGE])) / _EDGE for c in curves]
    return statistics.mean(gains), (sum(variances) ** 0.5) / len(curves)


def write_curves(curves: dict[str, dict[str, list[float]]], path: Path, *, append: bool) -> None:
    """Mean training reward of every step, by workload and seed; `append` keeps other workloads."""
    kept = json.loads(path.read_text()) if append and path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    lines = (f" {json.dumps(name)}: {json.dumps(seeds)}" for name, seeds in (kept | curves).items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def mcnemar(one: dict[str, bool], other: dict[str, bool]) -> tuple[int, int, float]:
    """Rows that only one of two models gets right, each way, and the exact two-sided p-value (McNemar 1947)."""
    assert one.keys() == other.keys(), "McNemar's test compares the same rows"
    first = sum(one[row] and not other[row] for row in one)
    second = sum(other[row] and not one[row] for row in one)
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def _rows(workload: str, found: dict[int, dict[str, Any]], parameters: int) -> list[rows.BenchmarkRow]:
    row = partial(rows.BenchmarkRow, workload=workload, parameters=parameters)
    n = next(iter(found.values()))["n"]
    made = []
    for name in ("majority", "sft_acc", "rl_acc", "sft_f1", "rl_f1"):
        values = {seed: f[name] for seed, f in found.items()}
        mean = statistics.mean(values.values())
        each = ", ".join(f"{seed}: {value:.3f}" for seed, value in values.items())
        spread = f"; standard deviation over seeds {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
        error = f"; standard error of one seed's rows {(mean * (1 - mean) / n) ** 0.5:.3f}" if "acc" in name else ""
        unit = "macro-F1" if "f1" in name else "accuracy"
        made.append(row(row=name, value=mean, unit=unit, samples=n, mode=f"seeds {each}{spread}{error}"))
    tokens = statistics.mean(f["prompt_tokens"] for f in found.values())
    mode = "mean over the prompts of GRPO, picture and text, with the tokenizer trained on the task's texts"
    made.append(row(row="prompt_tokens", value=tokens, unit="tokens", mode=mode))
    gain, error = reward_gain([f["rewards"] for f in found.values()])
    steps, seconds = len(next(iter(found.values()))["rewards"]), [f["step_seconds"] for f in found.values()]
    mode = f"last {_EDGE} of {steps} steps minus first {_EDGE}; median step {statistics.median(seconds):.2f} s"
    ratio = {"ratio": gain / error, "ratio_to": "standard errors"} if error else {}
    made.append(row(row="reward_gain", value=gain, unit="reward", samples=steps, mode=mode, **ratio))
    return made


def _comparison(task: str, hf: dict[int, dict[str, Any]], vllm: dict[int, dict[str, Any]]) -> rows.BenchmarkRow:
    """McNemar's test on the pooled test rows of all seeds."""
    pooled = [{f"{s}/{row}": ok for s, f in engine.items() for row, ok in f["right"].items()} for engine in (hf, vllm)]
    first, second, p = mcnemar(*pooled)
    return rows.BenchmarkRow(
        row="mcnemar_p",
        workload=f"{task}, hf against vllm, same rows",
        value=p,
        unit="p",
        samples=len(pooled[0]),
        mode=f"right with hf only {first}, with vllm only {second}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["ctu"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--engine", nargs="+", choices=("hf", "vllm"), default=["hf"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one device")
    parser.add_argument("--folder", type=Path, default=rows.ROOT / "checkpoints" / "learning")
    parser.add_argument("--data", type=Path, default=rows.ROOT / "data")
    parser.add_argument("--modality", choices=("image", "numeric"), default="image", help="a plot, or its digits")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sft-steps", type=int, default=1000)
    parser.add_argument("--sft-batch", type=int, default=16)
    parser.add_argument("--sft-share", type=float, default=1.0, help="of the supervised rows; GRPO sees all")
    parser.add_argument("--stop-parse-failure", type=float, help="end SFT sooner, at this share of malformed answers")
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--rl-batch", type=int, default=32, help="prompts a step; two optimizer steps, 8 answers each")
    parser.add_argument("--start", choices=STARTS, default="plots", help="the random model's weights and image scale")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--append", action="store_true", help="keep the rows of other tasks and engines")
    args = parser.parse_args()
    for task in args.tasks:
        get_task(task)
    shared = [field.name for field in fields(Recipe) if field.name != "folder"]
    recipe = Recipe(folder=args.folder.resolve(), **{name: getattr(args, name) for name in shared})
    runs = [Run(task, seed, engine) for seed in args.seeds for task in args.tasks for engine in args.engine]
    failed: list[str] = []

    def attempt(run: Run) -> dict[str, Any] | None:
        try:
            return train(run, recipe)
        except RuntimeError as error:
            print(f"{run}: {error}", flush=True)
            failed.append(str(run))
            return None

    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(runs, pool.map(attempt, runs), strict=True))
    suffix = "" if args.start == "plots" else f", {args.start} start"
    made: list[rows.BenchmarkRow] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for task in args.tasks:
        by_engine = {
            engine: {r.seed: f for r, f in results.items() if f and (r.task, r.engine) == (task, engine)}
            for engine in args.engine
        }
        for engine, found in by_engine.items():
            if found:
                parameters = rows.parameters_of(Run(task, min(found), engine).folder(recipe) / "tiny")
                workload = f"{task} ({args.modality}), {engine} engine{suffix}"
                made += _rows(workload, found, parameters)
                curves[workload] = {str(s): [round(x, 4) for x in f["rewards"]] for s, f in found.items()}
        if len(args.engine) == 2 and by_engine["hf"].keys() == by_engine["vllm"].keys() and by_engine["hf"]:
            made.append(_comparison(task + suffix, by_engine["hf"], by_engine["vllm"]))
    rows.write("learning", made, append=args.append)
    write_curves(curves, rows.RESULTS / "curves" / "learning.json", append=args.append)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
