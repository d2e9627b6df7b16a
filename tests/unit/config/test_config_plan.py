"""The batch rules, with the published run as golden numbers."""

from __future__ import annotations

import dataclasses

import pytest
from config_cases import ppo, sft, small

from verl.config.derived import max_context, sft_model, sft_optim, token_budgets, warmup_steps, world_size
from verl.config.plan import batch_plan, is_due, steps_at
from verl.config.table import render_table, resolved_table


def test_the_published_run_has_its_published_numbers() -> None:
    plan = batch_plan(ppo().config, 250)
    assert (plan.prompts_per_step, plan.samples_per_step, plan.samples_per_gpu) == (64, 320, 80)
    assert (plan.optimizer_steps_per_step, plan.samples_per_optimizer_step) == (2, 160)
    assert (plan.steps_per_epoch, plan.unused_rows_per_epoch, plan.total_steps) == (3, 58, 300)
    assert (plan.rollouts, plan.validations, plan.saved_at) == (96_000, 61, (100, 200, 300))
    assert plan.optimizer_steps == 600


def test_the_table_shows_the_published_numbers() -> None:
    rows = {row.name: f"{row.value} {row.note}" for row in resolved_table(ppo().config, 250, 250)}
    wanted = {
        "prompts a step": "64",
        "samples a step": "320",
        "samples a GPU": "80",
        "optimizer steps a step": "2 x 160 samples 40 a GPU",
        "steps an epoch": "3 58 rows unused",
        "steps": "300",
        "rollouts": "96,000",
        "validations": "61 of 250 rows",
        "saves": "at 100, 200, 300",
        "objective": "pg (clip 0.2/0.2) + 0.01 x KL(low_var_kl) token-mean",
        "micro-batch, update": "8,192",
        "micro-batch, reference": "16,384",
    }
    text = render_table(list(resolved_table(ppo().config, 250, 250)))
    for name, part in wanted.items():
        assert part in rows[name], f"{name}: {rows[name]}"
        assert name in text


def test_the_objective_names_exactly_the_terms_that_are_on() -> None:
    def objective(*overrides: str) -> str:
        return next(
            f"{r.value}; {r.note}" for r in resolved_table(ppo(*overrides).config, 250) if r.name == "objective"
        )

    off = "actor_rollout_ref.actor.use_kl_loss=False"
    assert objective(off) == "pg (clip 0.2/0.2); token-mean; no KL, no reference model"
    assert "reward - 0.001 x KL(kl), fixed" in objective(off, "algorithm.use_kl_in_reward=True")
    assert "- 0.01 x entropy" in objective("actor_rollout_ref.actor.entropy_coeff=0.01")


@pytest.mark.parametrize(
    ("frequency", "total", "expected"), [(5, 12, (5, 10, 12)), (4, 8, (4, 8)), (9, 3, (3,)), (0, 5, ()), (-1, 5, ())]
)
def test_events_come_every_k_steps_and_at_the_last(frequency: int, total: int, expected: tuple[int, ...]) -> None:
    assert steps_at(frequency, total) == expected
    assert tuple(step for step in range(1, total + 1) if is_due(frequency, step, total)) == expected


def test_too_few_rows_are_an_error_that_names_the_batch_size() -> None:
    with pytest.raises(ValueError, match=r"63 usable rows, fewer than data\.train_batch_size=64"):
        batch_plan(ppo().config, 63)
    assert batch_plan(ppo().config, 64).steps_per_epoch == 1


def test_total_training_steps_decides_the_length_alone() -> None:
    plan = batch_plan(ppo("trainer.total_training_steps=7").config, 250)
    assert (plan.total_steps, plan.rollouts, plan.validated_at) == (7, 7 * 320, (0, 5, 7))


def test_critic_warmup_delays_the_update() -> None:
    assert [batch_plan(ppo(f"trainer.critic_warmup={k}").config, 250).update_steps for k in (0, 1, 2, 300, 301)] == [
        300, 300, 299, 1, 0,
    ]  # fmt: skip


def test_prompts_need_not_divide_by_the_gpus() -> None:
    config = ppo("trainer.n_gpus_per_node=3", "actor_rollout_ref.rollout.tensor_model_parallel_size=1").config
    plan = batch_plan(config, 250)
    assert plan.samples_per_gpu == pytest.approx(320 / 3) and "106.7" in render_table(resolved_table(config, 250))


def test_a_global_micro_batch_size_is_divided_by_the_ranks() -> None:
    node = "actor_rollout_ref.actor.ppo_micro_batch_size"
    config = ppo(f"{node}_per_gpu=null", f"{node}=16").config
    assert token_budgets(config) == token_budgets(ppo().config)


def test_budgets_follow_the_keys() -> None:
    dynamic = ppo(
        "actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9000"
    )
    budgets = token_budgets(dynamic.config)
    assert (budgets.update, budgets.old_log_prob, budgets.ref_log_prob) == (9000, 9000, 9000)
    assert token_budgets(ppo("actor_rollout_ref.actor.use_kl_loss=False").config).ref_log_prob is None
    assert max_context(ppo().config) == 2048 and world_size(ppo("trainer.nnodes=2").config) == 8


def test_warmup_steps_come_before_the_ratio() -> None:
    optim = dataclasses.replace(small().config.actor_rollout_ref.actor.optim, lr_warmup_steps_ratio=0.1)
    assert warmup_steps(optim, 600) == 60
    assert warmup_steps(dataclasses.replace(optim, lr_warmup_steps=7), 600) == 7
    assert warmup_steps(dataclasses.replace(optim, lr_warmup_steps=0), 600) == 0


def test_sft_keys_reach_the_engines_names() -> None:
    config = sft(
        "optim.lr=3e-4", "optim.warmup_steps_ratio=0.2", "optim.min_lr_ratio=0.1", "model.partial_pretrain=m"
    ).config
    optim, model = sft_optim(config), sft_model(config)
    assert (optim.lr, warmup_steps(optim, 100), optim.warmup_style, optim.min_lr_ratio) == (3e-4, 20, "cosine", 0.1)
    assert optim.betas == (0.9, 0.95) and model.path == "m"
