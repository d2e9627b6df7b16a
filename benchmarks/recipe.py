"""What `learning.py` runs: the settings that all its runs share, and the two command lines of each."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from verl.utils.dataset.images import ImageSpec
from verl.utils.dataset.rl_dataset import DatasetOptions, load_rl_dataset, load_sft_dataset
from verl.utils.dataset.rows import Columns

STARTS = {"plots": (["--for-plots"], "5e-4"), "library": ([], "1e-3")}
"""How the random model is made (arguments of verl.models.tiny), and the learning rate of SFT that goes with it."""


RL_LR = 3e-4
"""Highest learning rate of GRPO, where no other is asked for; made for steps of 128 prompts."""


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    folder: Path
    data: Path
    hidden: int
    layers: int
    modality: str
    sft_share: float
    """Of the supervised rows, at most 1: GRPO sees all rows, as labels cost less than answers."""
    sft_steps: int
    sft_batch: int
    rl_steps: int
    """0: SFT alone."""
    rl_batch: int
    """Prompts of a step; fewer where there are fewer rows."""
    rl_lr: float
    """Highest learning rate of GRPO."""
    stop_parse_failure: float | None
    device: str
    start: str
    """A key of `STARTS`."""

    @property
    def taught(self) -> str:
        """The rows of SFT, in words."""
        return "all rows" if self.sft_share == 1 else f"{self.sft_share:.0%} of the rows"

    def variant(self, engine: str) -> str:
        """How a task is trained: the end of a workload's name. Start and rate of GRPO where they are not the default;
        sizes, steps and batches stand in the command of the rows alone."""
        start = "" if self.start == "plots" else f", {self.start} start"
        if not self.rl_steps:
            return f"SFT alone on {self.taught}{start}"
        taught = "" if self.sft_share == 1 else f", SFT on {self.taught}"
        rate = "" if self.rl_lr == RL_LR else f", GRPO at {self.rl_lr:g}"
        return f"{engine} engine{start}{taught}{rate}"


@dataclass(frozen=True)
class Run:
    """One task, seed and engine."""

    task: str
    seed: int
    engine: str

    def workload(self, recipe: Recipe) -> str:
        return f"{self.task} ({recipe.modality}), {recipe.variant(self.engine)}"

    def folder(self, recipe: Recipe) -> Path:
        """Of its own for every workload and seed: `ctu_image_hf_engine_sft_on_25_of_the_rows_seed1`."""
        words = re.findall(r"\w+", self.workload(recipe).lower())
        return recipe.folder / f"{'_'.join(words)}_seed{self.seed}"


def _sampling(prefix: str) -> list[str]:
    """Validation and test answers of both stages are drawn alike: greedy, so that rows can be compared."""
    return [f"{prefix}.temperature=0.0", f"{prefix}.do_sample=False", f"{prefix}.n=1"]


def cold_start(data: Path, share: float, seed: int, target: Path) -> Path:
    """The file of supervised rows; with `share` below 1 a new one, `target`, of that share of every label's rows."""
    source = data / "sft_fit.parquet"
    if share == 1:
        return source
    table, rng = pq.read_table(source), np.random.default_rng(seed)
    labels = np.array([reward["ground_truth"] for reward in table["reward_model"].to_pylist()])
    kept: list[int] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        kept += rows[: max(1, round(share * len(rows)))].tolist()
    pq.write_table(table.take(sorted(kept)), target)
    return target


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
    taught = cold_start(data, recipe.sft_share, run.seed, folder / "sft_fit.parquet")
    return [
        *(sys.executable, "-m", "verl.trainer.sft_trainer"),
        f"data.train_files={taught}",
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
        *("rollout.hf_batch_size=1024", "reward.format=strict"),
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
    rows = min(recipe.rl_batch, pq.read_metadata(data / "fit.parquet").num_rows)
    batch = rows - rows % 2  # two optimizer steps
    start = folder / "sft" / f"global_step_{(folder / 'sft' / 'latest_checkpointed_iteration.txt').read_text().strip()}"
    arl, actor = "actor_rollout_ref", "actor_rollout_ref.actor"
    rollout = [f"{arl}.rollout.name={run.engine}", f"{arl}.rollout.n=8", f"{arl}.rollout.temperature=0.7"]
    if run.engine == "vllm":
        rollout += [f"{arl}.rollout.gpu_memory_utilization=0.08", f"{arl}.rollout.enforce_eager=True"]
        # Told, not measured: what other runs on the GPU take and free meanwhile would disturb the measurement.
        rollout += [f"+{arl}.rollout.engine_kwargs.vllm.kv_cache_memory_bytes={2 << 30}"]
    else:
        rollout += [f"{arl}.rollout.hf_batch_size=1024"]
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        f"data.train_files={data}/fit.parquet",
        f"data.val_files={data}/val.parquet",
        f"data.test_files={data}/test.parquet",
        f"data.train_batch_size={batch}",
        f"data.max_prompt_length={limits.prompt}",
        f"data.max_response_length={limits.response}",
        f"{arl}.model.path={start}/actor/huggingface",
        f"{arl}.model.enable_gradient_checkpointing=False",
        *(f"{actor}.ppo_mini_batch_size={batch // 2}", f"{actor}.ppo_micro_batch_size_per_gpu=128"),
        *(f"{actor}.clip_ratio_high=0.28", f"{actor}.optim.lr={recipe.rl_lr}", f"{actor}.optim.betas=[0.9,0.95]"),
        *(f"{actor}.optim.lr_warmup_steps=5", f"{actor}.optim.warmup_style=cosine"),
        *(f"{actor}.optim.min_lr_ratio=0.05", f"{actor}.use_kl_loss=True", f"{actor}.kl_loss_coef=0.1"),
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
