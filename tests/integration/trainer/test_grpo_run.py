"""One run through Ray from beginning to end: what it prints, logs and leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import Run, pointer, read_lines, whole_checkpoints
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from verl.utils.checkpoint.sharded import load_sharded, model_state

pytestmark = pytest.mark.usefixtures("long_run")

SPREADS = ("critic/score", "critic/rewards", "critic/advantages", "critic/returns", "response_length", "prompt_length")
STEP_METRICS = {
    *(f"{name}/{kind}" for name in SPREADS for kind in ("mean", "max", "min")),
    *(
        f"actor/{n}"
        for n in [
            "pg_loss",
            "pg_clipfrac",
            "pg_clipfrac_lower",
            "ppo_kl",
            "entropy_loss",
            "entropy",
            "kl_loss",
            "kl_coef",
        ]
    ),
    "actor/grad_norm",
    "actor/lr",
    "response_length/clip_ratio",
    "prompt_length/clip_ratio",
    *(f"global_seqlen/{n}" for n in ["min", "max", "minmax_diff", "balanced_min", "balanced_max", "mean"]),
    *(
        f"timing_s/{n}"
        for n in ["step", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights"]
    ),
    *(f"timing_per_token_ms/{n}" for n in ["gen", "ref", "adv", "update_actor"]),
    *(f"perf/{n}" for n in ["total_num_tokens", "time_per_step", "throughput", "cpu_memory_used_gb"]),
    "training/global_step",
    "training/epoch",
    *(f"training/rollout_probs_diff_{n}" for n in ("mean", "max", "std")),
    "training/rollout_actor_probs_pearson_corr",
    "rollout_corr/kl",
    "rollout_corr/k3_kl",
}
SOURCE = "basic_motions_dataset"
VALIDATION_METRICS = {
    f"val/test_score/{SOURCE}",
    f"val/f1_score/{SOURCE}",
    f"val/acc/{SOURCE}",
    f"val-core/{SOURCE}/acc/mean@2",
    "timing_s/testing",
    "timing_s/save_checkpoint",
}


def test_every_step_has_verls_metric_names(long_run: Run) -> None:
    missing = {step: sorted(STEP_METRICS - row.keys()) for step, row in long_run.steps.items()}
    assert missing == {step: [] for step in range(1, 7)}


def test_validated_and_saved_steps_have_their_metric_names(long_run: Run) -> None:
    missing = {step: sorted(VALIDATION_METRICS - long_run.steps[step].keys()) for step in (3, 6)}
    assert missing == {3: [], 6: []}


def test_metrics_hold_one_line_a_step_after_the_first_validation_and_before_the_test(long_run: Run) -> None:
    kinds = [(row["step"], "training/global_step" in row, "test/accuracy" in row) for row in long_run.rows]
    assert kinds == [(0, False, False), *((step, True, False) for step in range(1, 7)), (6, False, True)]


def test_the_console_shows_a_line_a_step(long_run: Run) -> None:
    numbers = [int(n) for n in re.findall(r"^step (\d+)/6 \| time", long_run.out, re.M)]
    assert numbers == [1, 2, 3, 4, 5, 6], long_run.out


def test_phase_timers_add_up_to_the_step(long_run: Run) -> None:
    phases = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "update_weights")
    for step, row in long_run.steps.items():
        parts, whole = sum(row[f"timing_s/{name}"] for name in phases), row["timing_s/step"]
        assert abs(whole - parts) <= 0.02 * whole + 0.02, f"step {step}: phases {parts:.4f} s, step {whole:.4f} s"


def test_counts_of_tokens_agree_with_the_answers(long_run: Run) -> None:
    for step, row in long_run.steps.items():
        tokens = [answer["tokens"] for group in long_run.answers(step) for answer in group["answers"]]
        assert len(tokens) == 16, f"step {step}: {len(tokens)} answers"
        assert row["response_length/mean"] == pytest.approx(np.mean(tokens))
        assert row["perf/total_num_tokens"] == sum(tokens) + 16 * row["prompt_length/mean"]
        # one rank holds everything: each prompt once, each answer once
        held = sum(tokens) + 4 * row["prompt_length/mean"]
        assert row["global_seqlen/balanced_max"] == row["global_seqlen/max"] == held


def test_the_resolved_config_is_stored_and_says_what_ran(long_run: Run) -> None:
    config = yaml.safe_load((long_run.folder / "config.yaml").read_text())
    assert config["trainer"]["total_training_steps"] == 6
    assert config["actor_rollout_ref"]["rollout"]["seed"] == config["trainer"]["seed"]


def test_samples_are_dumped_each_step_sorted_by_score(long_run: Run) -> None:
    files = sorted(path.name for path in (long_run.folder / "samples").iterdir())
    assert files == [f"step_{step:06d}.jsonl" for step in range(1, 7)]
    for group in read_lines(long_run.folder / "samples" / files[0]):
        scores = [answer["score"] for answer in group["answers"]]
        assert scores == sorted(scores, reverse=True), group["uid"]
        assert group["ground_truth"] in {"Standing", "Running", "Walking", "Badminton"}


def test_reports_name_the_weights_they_were_made_with(long_run: Run, start: Path) -> None:
    sources = {name: long_run.report(name)["weights"] for name in ("val_step_0", "val_step_3", "val_step_6")}
    assert sources == {"val_step_0": str(start), "val_step_3": "global_step_3", "val_step_6": "global_step_6"}


def test_the_test_report_is_of_the_checkpoint_that_was_best_on_val(long_run: Run) -> None:
    best = max((3, 6), key=lambda step: (long_run.steps[step]["val/accuracy"], -step))
    assert long_run.report("test")["weights"] == f"global_step_{best}"


def test_checkpoints_have_the_published_layout(long_run: Run) -> None:
    assert (whole_checkpoints(long_run.folder), pointer(long_run.folder)) == ([3, 6], 6)
    names = {path.name for path in (long_run.checkpoint(6) / "actor" / "huggingface").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not list(long_run.folder.rglob("*world_size*")), "names of the original's shards are left to those"
    assert not list(long_run.folder.rglob("*.pt")), "no pickle is written"


@pytest.mark.parametrize("step", [3, 6])
def test_the_huggingface_folder_loads_with_plain_transformers_and_equals_the_sharded_weights(
    long_run: Run, step: int
) -> None:
    folder = long_run.checkpoint(step) / "actor" / "huggingface"
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder)
    stored = {name: torch.empty_like(value) for name, value in model_state(plain).items()}
    load_sharded(long_run.checkpoint(step) / "actor" / "model", stored)
    different = [name for name, value in model_state(plain).items() if not torch.equal(value, stored[name])]
    assert different == []


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(long_run: Run) -> None:
    """12 optimizer steps, 4 of warm-up, down to a tenth: the rate of the second optimizer step of each step."""
    at = [min(t + 1, 5) / 5 if t < 4 else 0.1 + 0.9 * (1 + np.cos(np.pi * (t - 4) / 8)) / 2 for t in range(1, 12, 2)]
    assert [row["actor/lr"] for row in long_run.steps.values()] == pytest.approx([1e-3 * factor for factor in at])


def test_rewards_differ_within_groups_so_the_run_teaches_something(long_run: Run) -> None:
    """Without this the parities below would compare zeros."""
    shares = [row["training/groups/mixed_share"] for row in long_run.steps.values()]
    norms = [row["actor/grad_norm"] for row in long_run.steps.values()]
    assert max(shares) >= 0.5 and min(norms) > 0, (shares, norms)


def test_the_first_forward_agrees_with_the_sampler(long_run: Run) -> None:
    for step, row in long_run.steps.items():
        assert row["training/rollout_probs_diff_max"] < 1e-4, f"step {step}"
        assert row["training/rollout_actor_probs_pearson_corr"] > 0.9999, f"step {step}"
