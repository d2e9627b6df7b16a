"""Does a model trained from nothing learn the tasks? SFT, then GRPO, per task and seed, on the untouched test split.

Every run makes a random Qwen2.5-VL of a few million parameters, trains it on the supervised answers for a fixed number
of steps (with `--stop-parse-failure 0.02`: until fewer than 2 % of its validation answers are malformed, a rule that
does not look at accuracy), and goes on with GRPO. With `--sft-share 0.25` SFT is a cold start on a quarter of the rows,
while GRPO sees them all: a label costs less than a written answer. `--rl-steps 0` is the control, SFT alone. Limits of
prompts and answers follow from the data. Reported are the test accuracy and macro-F1 before and after GRPO, what GRPO
added to each seed, and whether the training reward rose: mean of the last ten steps minus the first ten, in standard
errors of the steps. `curves/learning.json` holds every step's mean reward.

    python3 benchmarks/learning.py --tasks ctu har --seeds 1 2 3 --engine hf --jobs 6
    python3 benchmarks/learning.py --tasks ctu har --rl-steps 0 --sft-steps 420 --append    # the control
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import rows
from learning_rows import comparison, rows_of
from recipe import RL_LR, STARTS, Limits, Recipe, Run, rl_command, sft_command
from stored import stored

from verl.timeseries.tasks import get_task

Curves = dict[str, list[float]]
"""Mean training reward of every step, by seed."""


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
    stages = [f"majority {found['majority']:.3f}"]
    for stage in ("sft", "rl") if recipe.rl_steps else ("sft",):
        accuracy, f1, seconds = (found[f"{stage}_{what}"] for what in ("acc", "f1", "seconds"))
        stages.append(f"{stage} {accuracy:.3f}, macro-F1 {f1:.3f}, {seconds:.0f} s")
    print(f"{run.task} seed {run.seed} {run.engine}: {'; '.join(stages)}", flush=True)
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
    found = _read_sft(folder) | {"sft_seconds": middle - begin}
    if recipe.rl_steps:
        _call(rl_command(run, recipe, limits), log)
        found |= _read_rl(folder) | {"rl_seconds": time.monotonic() - middle}
    return found


def _report(run: Path) -> dict[str, Any]:
    (report,) = json.loads((run / "reports" / "test.json").read_text())["reports"].values()
    return dict(report)


def _stage(name: str, report: dict[str, Any], answers: Path) -> dict[str, Any]:
    """Accuracies of a stage, and which test rows are right."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    return {
        "n": report["n_prompts"],
        "majority": report["majority_share"],
        f"{name}_acc": report["accuracy"],
        f"{name}_f1": report["classification"]["macro_f1"],
        f"{name}_parse_failure": report["classification"]["parse_failure_rate"],
        f"{name}_right": {a["uid"]: a["answers"][0]["prediction"] == a["ground_truth"] for a in lines},
    }


def _read_sft(folder: Path) -> dict[str, Any]:
    found = _stage("sft", _report(folder / "sft"), folder / "sft" / "samples" / "test.jsonl")
    return found | {"size": json.loads((folder / "tiny" / "tiny.json").read_text())}


def _read_rl(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "critic/rewards/mean" in line]
    return _stage("rl", _report(folder / "rl"), folder / "rl" / "validation" / "test.jsonl") | {
        "rewards": [step["critic/rewards/mean"] for step in steps],
        "step_seconds": statistics.median(step["timing_s/step"] for step in steps),
        "prompt_tokens": statistics.mean(step["prompt_length/mean"] for step in steps),
    }


def write_curves(curves: dict[str, Curves], path: Path, *, append: bool) -> None:
    """Mean training reward of every step, by workload and seed; `append` keeps other workloads."""
    kept = json.loads(path.read_text()) if append and path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    lines = (f" {json.dumps(name)}: {json.dumps(seeds)}" for name, seeds in (kept | curves).items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def rows_and_curves(
    results: Mapping[Run, dict[str, Any]], recipe: Recipe
) -> tuple[list[rows.BenchmarkRow], dict[str, Curves]]:
    """Of every task and engine with a result, and the engines' comparison where all seeds ran with both."""
    made: list[rows.BenchmarkRow] = []
    curves: dict[str, Curves] = {}
    for task in dict.fromkeys(run.task for run in results):
        by_engine: dict[str, dict[int, dict[str, Any]]] = {}
        for run, found in results.items():
            if run.task == task:
                by_engine.setdefault(run.engine, {})[run.seed] = found
        for engine, seeds in by_engine.items():
            run = Run(task, min(seeds), engine)
            workload = run.workload(recipe)
            made += rows_of(workload, seeds, rows.parameters_of(run.folder(recipe) / "tiny"))
            if recipe.rl_steps:
                curves[workload] = {str(seed): [round(x, 4) for x in f["rewards"]] for seed, f in seeds.items()}
        if recipe.rl_steps and len(by_engine) == 2 and by_engine["hf"].keys() == by_engine["vllm"].keys():
            made.append(
                comparison(task + recipe.variant("hf").removeprefix("hf engine"), by_engine["hf"], by_engine["vllm"])
            )
    return made, curves


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    parser.add_argument("--rl-steps", type=int, default=60, help="0: SFT alone")
    parser.add_argument("--rl-batch", type=int, default=32, help="prompts a step; two optimizer steps, 8 answers each")
    parser.add_argument("--rl-lr", type=float, default=RL_LR, help="highest learning rate of GRPO")
    parser.add_argument("--start", choices=STARTS, default="plots", help="the random model's weights and image scale")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--append", action="store_true", help="keep the rows of other workloads")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    if not args.rl_steps and len(args.engine) > 1:
        raise SystemExit("--rl-steps 0 has no engine to compare: give one --engine")
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
        results = {run: found for run, found in zip(runs, pool.map(attempt, runs), strict=True) if found}
    made, curves = rows_and_curves(results, recipe)
    rows.write("learning", made, append=args.append)
    write_curves(curves, rows.RESULTS / "curves" / "learning.json", append=args.append)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
