"""A whole GRPO step through the Trainer: generate, score, reference, old log-probs, updates, weight sync.

    python3 benchmarks/grpo_step.py --engine vllm                  # CTU-3B on one GPU
    python3 benchmarks/grpo_step.py --engine vllm --gpus 4         # weak scaling: 64 prompts a GPU
    python3 benchmarks/grpo_step.py --model-size tiny --engine hf  # the same code on a CPU
    python3 benchmarks/grpo_step.py --run RUN                      # rows of a run that a script of example/ made

Seconds are medians of the Trainer's own `timing_s/*` over the measured steps. `--set` passes further settings to the
Trainer; whatever is set is named in the rows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rows
import yaml
from PIL import Image
from transformers import AutoTokenizer
from workload import WORKLOADS, Workload, ctu_3b_model, picture

PHASES = {
    "generate_s": "timing_s/gen",
    "reward_s": "timing_s/reward",
    "reference_s": "timing_s/ref",
    "old_log_prob_s": "timing_s/old_log_prob",
    "update_s": "timing_s/update_actor",
    "weight_sync_s": "timing_s/update_weights",
}
_VLLM = (
    "actor_rollout_ref.rollout.enforce_eager=False",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.2",
    "actor_rollout_ref.rollout.free_cache_engine=True",
)
"""CUDA graphs, room for the keys of all 320 answers, and none of it held during the update."""
_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def write_data(folder: Path, model: Path, workload: Workload, count: int) -> tuple[Path, Path]:
    """`count` training prompts of exactly `prompt_tokens` tokens with one picture each, and one to validate."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(3)
    empty = len(tokenizer(_TEMPLATE.format(""))["input_ids"]) + workload.image_tokens + 2
    letters = workload.prompt_tokens - empty
    assert letters > 0, f"the template and the picture take {empty} of {workload.prompt_tokens} tokens"
    records = []
    for number in range(count + 1):
        text = "".join(rng.choice(list("abcdefghij klmnop"), letters))
        png = io.BytesIO()
        Image.fromarray(picture(f"p{number}", workload.grid, rng).pixels.transpose(1, 2, 0)).save(png, "PNG")
        records.append(
            {
                "data_source": "benchmark",
                "prompt": [{"role": "user", "content": "<image>" + text}],
                "images": [{"bytes": png.getvalue(), "path": None}],
                "reward_model": {"style": "rule", "ground_truth": "A"},
                "extra_info": {"index": number},
            }
        )
    paths = folder / "train.parquet", folder / "val.parquet"
    for path, part in zip(paths, (records[:-1], records[-1:]), strict=True):
        pq.write_table(pa.Table.from_pylist(part), path)
    return paths


def settings(
    args: argparse.Namespace, workload: Workload, model: Path, data: tuple[Path, Path], run: Path
) -> list[str]:
    """Overrides of the Trainer's config. The user's own come last."""
    prompts = workload.prompts * args.gpus
    group = workload.prompt_tokens + workload.n * workload.answer_tokens + int(0.25 * 4 * workload.image_tokens)
    worker, longest = "actor_rollout_ref", workload.prompt_tokens + workload.answer_tokens
    return [
        f"data.train_files={data[0]}",
        f"data.val_files={data[1]}",
        f"data.train_batch_size={prompts}",
        f"data.max_prompt_length={workload.prompt_tokens}",
        f"data.max_response_length={workload.answer_tokens}",
        f"data.image_cache_dir={run.parent / 'images'}",
        f"{worker}.model.path={model}",
        f"{worker}.model.enable_gradient_checkpointing={args.checkpointing}",
        f"{worker}.actor.ppo_mini_batch_size={workload.mini_batch * args.gpus}",
        f"{worker}.actor.use_dynamic_bsz=True",
        f"{worker}.actor.ppo_max_token_len_per_gpu={max(longest, args.groups * group)}",
        f"{worker}.rollout.log_prob_max_token_len_per_gpu={max(longest, args.log_prob_groups * group)}",
        f"{worker}.ref.log_prob_max_token_len_per_gpu={max(longest, args.log_prob_groups * group)}",
        f"{worker}.actor.use_kl_loss=True",
        f"{worker}.actor.kl_loss_coef=0.01",
        f"{worker}.rollout.name={args.engine}",
        f"{worker}.rollout.n={workload.n}",
        f"{worker}.rollout.ignore_eos=True",
        f"{worker}.rollout.temperature=1.0",
        f"custom_reward_function.path={rows.ROOT / 'benchmarks' / 'grpo_reward.py'}",
        f"trainer.default_local_dir={run}",
        f"trainer.n_gpus_per_node={args.gpus}",
        f"trainer.total_training_steps={args.warm_up + args.steps}",
        "trainer.logger=[console]",
        "trainer.resume_mode=disable",
        "trainer.keep_best=False",
        "trainer.val_before_train=False",
        *(_VLLM if args.engine == "vllm" else ()),
        *args.set,
    ]


def train(overrides: Sequence[str], run: Path) -> tuple[list[dict[str, float]], str]:
    """Metrics of every step of a new run in `run`, and the memory switches that were on."""
    from verl.config import load
    from verl.trainer.ppo.switches import fixed_switches
    from verl.trainer.ray_trainer import Trainer

    trainer = Trainer(load("ppo_trainer", list(overrides)))
    try:
        trainer.fit()
        decided = fixed_switches(trainer.workers.config)
    finally:
        trainer.close()
    return steps_of(run), ", ".join(name for name, on in decided.items() if on) or "none"


def steps_of(run: Path) -> list[dict[str, float]]:
    """Metrics of every step that a run has logged in its folder."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "timing_s/step" in line]


@dataclass(frozen=True)
class Shape:
    """What one step of a run holds."""

    workload: str
    mode: str
    gpus: int
    samples: int
    tokens: float
    """Prompt and answer tokens of all samples."""
    answers: float
    """Answer tokens of all samples."""

    @classmethod
    def of_workload(cls, args: argparse.Namespace, workload: Workload, switches: str) -> Shape:
        samples = workload.samples * args.gpus
        mode = f"{args.gpus} ranks, {args.engine}, {args.groups} groups a micro-batch, memory switches on: {switches}"
        return cls(
            workload=workload.name + (f", {args.label}" if args.label else ""),
            mode=mode + "".join(f", {item}" for item in args.set),
            gpus=args.gpus,
            samples=samples,
            tokens=samples * (workload.prompt_tokens + workload.answer_tokens),
            answers=samples * workload.answer_tokens,
        )

    @classmethod
    def of_run(cls, run: Path, label: str, steps: Sequence[dict[str, float]]) -> Shape:
        """From a run's resolved config and the lengths that it logged."""
        config = yaml.safe_load((run / "config.yaml").read_text())
        rollout, trainer = config["actor_rollout_ref"]["rollout"], config["trainer"]
        samples = config["data"]["train_batch_size"] * rollout["n"]
        prompt, answer = (median(step[f"{name}_length/mean"] for step in steps) for name in ("prompt", "response"))
        ranks = trainer["nnodes"] * trainer["n_gpus_per_node"]
        mode, apart = f"{ranks} ranks, {rollout['name']}", 0
        if not config["actor_rollout_ref"]["hybrid_engine"]:
            apart = rollout["nnodes"] * rollout["n_gpus_per_node"]
            mode += f" on {apart} GPUs of its own"
        return cls(label, mode, ranks + apart, samples, samples * (prompt + answer), samples * answer)


def result_rows(shape: Shape, measured: Sequence[dict[str, float]]) -> list[rows.BenchmarkRow]:
    """Medians over the measured steps, peaks, and how much memory was held more at the end than at the beginning."""
    mode = f"{shape.mode}; median of {len(measured)} steps"

    def row(name: str, value: float, unit: str, note: str = "") -> rows.BenchmarkRow:
        return rows.BenchmarkRow(
            row=name, workload=shape.workload, value=value, unit=unit, samples=shape.samples, mode=mode + note
        )

    def seconds(metric: str) -> list[float]:
        return [step[metric] for step in measured if metric in step]

    whole = seconds("timing_s/step")
    spread = f" ({min(whole):.3g}-{max(whole):.3g} s)"
    made = [
        row("step_s", median(whole), "s", spread),
        row("step_tokens_per_s_per_gpu", shape.tokens / median(whole) / shape.gpus, "tokens/s"),
    ]
    made += [row(name, median(seconds(metric)), "s") for name, metric in PHASES.items() if seconds(metric)]
    made.append(row("generate_tokens_per_s", shape.answers / median(seconds("timing_s/gen")), "response tokens/s"))
    rest = [step["timing_s/step"] - sum(step.get(metric, 0.0) for metric in PHASES.values()) for step in measured]
    made.append(row("rest_s", median(rest), "s", "; step less the phases above"))
    for name, metric in (
        ("peak_gpu_gib", "perf/max_memory_allocated_gb"),
        ("peak_host_gib", "perf/cpu_memory_used_gb"),
    ):
        if seconds(metric):
            made.append(row(name, max(seconds(metric)), "GiB", "; largest process"))
    if apart := seconds("canary/logprob_diff_mean"):
        made.append(row("canary_logprob_diff_mean", max(apart), "nats", "; engine to actor, the worst step"))
    for name, metric in (
        ("gpu_growth_gib", "perf/gpu_memory_in_use_gb"),
        ("host_growth_gib", "perf/cpu_memory_resident_gb"),
    ):
        if held := seconds(metric):
            note = f"; last measured step less the first, all workers: {held[0]:.2f} to {held[-1]:.2f}"
            made.append(row(name, held[-1] - held[0], "GiB", note))
    return made


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=sorted(WORKLOADS), default="3b")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--gpus", type=int, default=1, help="ranks; the batch grows with them")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--groups", type=int, default=6, help="prompts of a micro-batch of the update")
    parser.add_argument("--log-prob-groups", type=int, default=16, help="prompts of a micro-batch without gradients")
    parser.add_argument(
        "--checkpointing", choices=("auto", "True", "False"), default="auto", help="auto: the memory plan decides"
    )
    parser.add_argument("--model", type=Path, help="folder of the model (made when absent); default: a temporary one")
    parser.add_argument("--append", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of grpo_step.json")
    parser.add_argument("--label", default="", help="told beside the workload, so that rows of several set-ups stay")
    parser.add_argument("--run", type=Path, help="folder of a run that is there, named by --label; nothing is trained")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the Trainer")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    workload = WORKLOADS[args.model_size]
    if args.run is not None:
        steps = steps_of(args.run)[args.warm_up :]
        made = result_rows(Shape.of_run(args.run, args.label, steps), steps)
        rows.write("grpo_step", made, folder=args.results, append=args.append)
        return
    model = args.model or Path(tempfile.gettempdir()) / f"timemaster-{workload.name.lower()}"
    ctu_3b_model(model, workload)
    with tempfile.TemporaryDirectory(prefix="grpo_step_") as scratch:
        run = Path(scratch) / "run"
        steps_of_rows = workload.prompts * args.gpus * 2
        data = write_data(Path(scratch), model, workload, steps_of_rows)
        steps, switches = train(settings(args, workload, model, data, run), run)
    made = result_rows(Shape.of_workload(args, workload, switches), steps[args.warm_up :])
    rows.write("grpo_step", made, folder=args.results, append=args.append)


if __name__ == "__main__":
    sys.path.insert(0, str(rows.ROOT))
    main()
