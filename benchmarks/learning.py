"""Does a model trained from nothing learn the tasks? SFT, then GRPO, per task and seed, on the untouched test split.

Every run makes a random Qwen2.5-VL of a few million parameters, trains it on the supervised answers for a fixed number
of steps (with `--stop-parse-failure 0.02`: until fewer than 2 % of its validation answers are malformed, a rule that
does not look at accuracy), and goes on with GRPO. Limits of prompts and answers follow from the data. Reported are the
test accuracy and macro-F1 before and after GRPO, and whether the training reward rose: mean of the last ten
steps minus the first ten, in standard errors over the seeds. `curves/learning.json` holds every step's mean reward.

    python3 benchmarks/learning.py --tasks ctu har --seeds 1 2 3 --engine hf --jobs 6
    python3 benchmarks/learning.py --tasks basic_motions --engine hf vllm      # and McNemar's test between the two

The data folders (`data/<task>_<modality>`) must be there: see example/data_preprocess.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rows
from scipy.stats import binomtest
from stored import stored
from transformers import AutoTokenizer

from verl.timeseries.tasks import get_task
from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.rl_dataset import DatasetOptions, load_rl_dataset, load_sft_dataset
from verl.utils.dataset.rows import Columns

_EDGE = 10  # steps at each end of the reward curve that are compared


STARTS = {"plots": (["--for-plots"], "5e-4"), "library": ([], "1e-3")}
"""How the random model is made (arguments of verl.models.tiny), and the learning rate of SFT that goes with it."""


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    folder: Path
    data: Path
    hidden: int
    layers: int
    modality: str
    sft_steps: int
    sft_batch: int
    rl_steps: int
    stop_parse_failure: float | None
    device: str
    start: str
    """A key of `STARTS`."""


@dataclass(frozen=True)
class Run:
    """One task, seed and engine."""

    task: str
    seed: int
    engine: str

    def folder(self, recipe: Recipe) -> Path:
        return recipe.folder / f"{self.task}_{recipe.modality}_{self.engine}_seed{self.seed}"


def _sampling(prefix: str) -> list[str]:
    """Validation and test answers of both stages are drawn alike: greedy, so that rows can be compared."""
    return [f"{prefix}.temperature=0.0", f"{prefix}.do_sample=False", f"{prefix}.n=1"]


@dataclass(frozen=True)
class Limits:
    """Tokens that prompts and answers may have."""

    prompt: int
    response: int

    @classmethod
    def of(cls, model: Path, data: Path) -> Limits:
        """The longest prompt, and the longest supervised answer with a quarter more, in steps of 32."""
        tokenizer, spec = AutoTokenizer.from_pretrained(model), ImageSpec.from_pretrained(model)
        taught = DatasetOptions(columns=Columns(response="response"))
        examples = load_sft_dataset([data / f"sft_{name}.parquet" for name in ("fit", "val")], tokenizer, spec, taught)
        tested = load_rl_dataset(data / "test.parquet", tokenizer, spec, DatasetOptions())
        prompts = [*(example.prompt for example in examples), *tested]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        answer = max(len(example.response_ids) for example in examples)
        return cls(32 * math.ceil(longest / 32), 32 * math.ceil(1.25 * answer / 32))


def sft_command(run: Run, recipe: Recipe, limits: Limits) -> list[str]:
    folder, data = run.folder(recipe), recipe.data / f"{run.task}_{recipe.modality}"
    return [
        *(sys.executable, "-m", "verl.trainer.sft_trainer"),
        f"data.train_files={data}/sft_fit.parquet",
        f"data.val_files={data}/sft_val.parquet",
        f"data.test_files={data}/test.parquet",
        *(f"data.train_batch_size={recipe.sft_batch}", f"data.micro_batch_size_per_gpu={recipe.sft_batch}"),
        f"data.max_length={limits.prompt + limits.response}",
        f"data.max_prompt_length={limits.prompt}",
        f"data.max_response_length={limits.response}",
        f"model.partial_pretrain={folder}/tiny",
        "model.enable_gradient_checkpointing=False",
        *(f"optim.lr={STARTS[recipe.start][1]}", "optim.warmup_steps_ratio=0.02"),
        f"optim.lr_scheduler={'cosine' if recipe.stop_parse_failure is None else 'constant'}",
        *_sampling("rollout"),
        *("rollout.hf_batch_size=512", "reward.format=strict"),
        f"trainer.stop_parse_failure={'null' if recipe.stop_parse_failure is None else recipe.stop_parse_failure}",
        f"trainer.total_training_steps={recipe.sft_steps}",
        f"trainer.test_freq={-1 if recipe.stop_parse_failure is None else 50}",
        *("trainer.save_freq=-1", "trainer.resume_mode=disable"),
        f"trainer.seed={run.seed}",
        f"trainer.device={recipe.device}",
        f"trainer.default_local_dir={folder}/sft",
    ]


def rl_command(run: Run, recipe: Recipe, limits: Limits) -> list[str]:
    folder, data = run.folder(recipe), recipe.data / f"{run.task}_{recipe.modality}"
    start = folder / "sft" / f"global_step_{(folder / 'sft' / 'latest_checkpointed_iteration.txt').read_text().strip()}"
    arl, actor = "actor_rollout_ref", "actor_rollout_ref.actor"
    rollout = [f"{arl}.rollout.name={run.engine}", f"{arl}.rollout.n=8", f"{arl}.rollout.temperature=0.7"]
    if run.engine == "vllm":
        rollout += [f"{arl}.rollout.gpu_memory_utilization=0.08", f"{arl}.rollout.enforce_eager=True"]
        # Told, not measured: what other runs on the GPU take and free meanwhile would disturb the measurement.
        rollout += [f"+{arl}.rollout.engine_kwargs.vllm.kv_cache_memory_bytes={2 << 30}"]
    else:
        rollout += [f"{arl}.rollout.hf_batch_size=512"]
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        f"data.train_files={data}/fit.parquet",
        f"data.val_files={data}/val.parquet",
        f"data.test_files={data}/test.parquet",
        "data.train_batch_size=32",
        f"data.max_prompt_length={limits.prompt}",
        f"data.max_response_length={limits.response}",
        f"{arl}.model.path={start}/actor/huggingface",
        f"{arl}.model.enable_gradient_checkpointing=False",
        *(f"{actor}.ppo_mini_batch_size=16", f"{actor}.ppo_micro_batch_size_per_gpu=128"),
        *(f"{actor}.clip_ratio_high=0.28", f"{actor}.optim.lr=3e-4", f"{actor}.optim.betas=[0.9,0.95]"),
        *(f"{actor}.optim.lr_warmup_steps=5", f"{actor}.optim.warmup_style=cosine"),
        *(f"{actor}.optim.min_lr_ratio=0.05", f"{actor}.use_kl_loss=True", f"{actor}.kl_loss_coef=0.3"),
        f"{arl}.ref.log_prob_micro_batch_size_per_gpu=256",
        f"{arl}.rollout.log_prob_micro_batch_size_per_gpu=256",
        *rollout,
        *_sampling(f"{arl}.rollout.val_kwargs"),
        *("reward.format=strict", "reward.num_workers=1", "trainer.n_gpus_per_node=1"),
        f"trainer.total_training_steps={recipe.rl_steps}",
        *("trainer.total_epochs=100000", "trainer.val_before_train=False", "trainer.test_freq=-1"),
        *("trainer.save_freq=100000", "trainer.keep_best=False", "trainer.logger=[console]"),
        *("trainer.resume_mode=disable", f"trainer.seed={run.seed}", f"trainer.device={recipe.device}"),
        f"trainer.validation_data_dir={folder}/rl/validation",
        f"trainer.default_local_dir={folder}/rl",
    ]


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
    n = next(iter(found.values()))["n"]
    made = []
    for name in ("majority", "sft_acc", "rl_acc", "sft_f1", "rl_f1"):
        values = {seed: f[name] for seed, f in found.items()}
        mean = statistics.mean(values.values())
        each = ", ".join(f"{seed}: {value:.3f}" for seed, value in values.items())
        spread = f"; standard deviation over seeds {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
        error = f"; standard error of one seed's rows {(mean * (1 - mean) / n) ** 0.5:.3f}" if "acc" in name else ""
        made.append(
            rows.BenchmarkRow(
                row=name,
                workload=workload,
                value=mean,
                unit="macro-F1" if "f1" in name else "accuracy",
                parameters=parameters,
                samples=n,
                mode=f"seeds {each}{spread}{error}",
            )
        )
    tokens = statistics.mean(f["prompt_tokens"] for f in found.values())
    made.append(
        rows.BenchmarkRow(
            row="prompt_tokens",
            workload=workload,
            value=tokens,
            unit="tokens",
            mode="mean over the prompts of GRPO, picture and text, with the tokenizer trained on the task's texts",
        )
    )
    gain, error = reward_gain([f["rewards"] for f in found.values()])
    steps, seconds = len(next(iter(found.values()))["rewards"]), [f["step_seconds"] for f in found.values()]
    made.append(
        rows.BenchmarkRow(
            row="reward_gain",
            workload=workload,
            value=gain,
            unit="reward",
            parameters=parameters,
            samples=steps,
            ratio=gain / error if error else None,
            ratio_to="standard errors" if error else None,
            mode=f"last {_EDGE} of {steps} steps minus first {_EDGE}; median step {statistics.median(seconds):.2f} s",
        )
    )
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
    parser.add_argument("--stop-parse-failure", type=float, help="end SFT sooner, at this share of malformed answers")
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--start", choices=STARTS, default="plots", help="the random model's weights and image scale")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--append", action="store_true", help="keep the rows of other tasks and engines")
    args = parser.parse_args()
    for task in args.tasks:
        get_task(task)
    shared = (
        "data",
        "modality",
        "hidden",
        "layers",
        "sft_steps",
        "sft_batch",
        "rl_steps",
        "stop_parse_failure",
        "device",
        "start",
    )
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
