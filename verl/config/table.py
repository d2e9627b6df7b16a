"""The resolved table: what one run will do, printed at start."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from verl.config.derived import clip_range, sequence_limit, token_budgets, uses_reference, warmup_steps, world_size
from verl.config.plan import BatchPlan, batch_plan
from verl.config.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the resolved table."""

    name: str
    value: str
    note: str


def resolved_table(config: PPOConfig, n_train_rows: int, n_val_rows: int | None = None) -> list[Row]:
    """What this run will do, one row a line. Raises ValueError as `batch_plan` and `token_budgets`."""
    plan, ranks = batch_plan(config, n_train_rows), world_size(config)
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    per_step = f"{plan.optimizer_steps_per_step} x {plan.samples_per_optimizer_step} samples"
    validations = f"{plan.validations}" + ("" if n_val_rows is None else f" of {n_val_rows} rows")
    return [
        Row("ranks", f"{ranks}", f"{trainer.nnodes} node(s) x {trainer.n_gpus_per_node}"),
        Row("prompts a step", f"{plan.prompts_per_step:,}", f"of {n_train_rows:,} rows"),
        Row("samples a step", f"{plan.samples_per_step:,}", f"{rollout.n} answers a prompt"),
        Row("samples a GPU", _number(plan.samples_per_gpu), "mean; groups are spread by cost"),
        Row("optimizer steps a step", per_step, f"{_number(plan.samples_per_optimizer_step / ranks)} a GPU"),
        Row("tokens a rank, a step", f"<= {plan.tokens_per_rank:,.0f}", "mean; a prompt counts once for its answers"),
        *_budget_rows(config),
        Row("steps an epoch", f"{plan.steps_per_epoch:,}", f"{plan.unused_rows_per_epoch} rows unused each epoch"),
        Row("steps", f"{plan.total_steps:,}", _length_note(config, plan)),
        Row("rollouts", f"{plan.rollouts:,}", "training answers"),
        Row("validations", validations, f"{_steps(plan.validated_at)}, {rollout.val_kwargs.n} answer(s) a row"),
        Row("saves", f"{len(plan.saved_at)}", _steps(plan.saved_at)),
        Row("objective", *_objective(config)),
        Row("learning rate", *_schedule(config, plan)),
    ]


def _budget_rows(config: PPOConfig) -> list[Row]:
    budgets, longest = token_budgets(config), sequence_limit(config)
    group = config.data.max_prompt_length + config.actor_rollout_ref.rollout.n * config.data.max_response_length
    cut = "a full group is cut into parts that repeat the prompt" if group > budgets.update else "holds a full group"
    rows = [
        Row("micro-batch, update", f"<= {budgets.update:,} tokens", f"{budgets.update // longest} full samples; {cut}"),
        Row("micro-batch, old log-probs", f"<= {budgets.old_log_prob:,} tokens", ""),
    ]
    if budgets.ref_log_prob is not None:
        rows.append(Row("micro-batch, reference", f"<= {budgets.ref_log_prob:,} tokens", ""))
    return rows


def _length_note(config: PPOConfig, plan: BatchPlan) -> str:
    trainer = config.trainer
    note = f"{trainer.total_epochs} epochs"
    if trainer.total_training_steps is not None:
        note = f"{plan.total_steps / plan.steps_per_epoch:.3g} epochs, by trainer.total_training_steps"
    if plan.update_steps < plan.total_steps:
        note += f"; the actor is updated in {plan.update_steps} of them (trainer.critic_warmup={trainer.critic_warmup})"
    return note


def _objective(config: PPOConfig) -> tuple[str, str]:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    low, high = clip_range(actor)
    mode = actor.policy_loss.loss_mode
    terms = [f"{'pg' if mode == 'vanilla' else mode} (clip {low:g}/{high:g})"]
    if actor.use_kl_loss:
        terms.append(f"{actor.kl_loss_coef:g} x KL({actor.kl_loss_type})")
    text = " + ".join(terms)
    if actor.entropy_coeff:
        text += f" - {actor.entropy_coeff:g} x entropy"
    if not uses_reference(config):
        return text, f"{actor.loss_agg_mode}; no KL, no reference model"
    if algorithm.use_kl_in_reward:
        kl = f"reward - {algorithm.kl_ctrl.kl_coef:g} x KL({algorithm.kl_penalty}), {algorithm.kl_ctrl.type}"
        return text, f"{actor.loss_agg_mode}; {kl}"
    return text, actor.loss_agg_mode


def _schedule(config: PPOConfig, plan: BatchPlan) -> tuple[str, str]:
    optim = config.actor_rollout_ref.actor.optim
    total = optim.total_training_steps if optim.total_training_steps > 0 else plan.optimizer_steps
    warmup = warmup_steps(optim, total)
    note = f"{warmup} of {total} optimizer steps of warm-up" + (", the peak is never reached" * (warmup > total))
    if optim.warmup_style == "cosine":
        note += f", then cosine to {optim.min_lr_ratio * optim.lr:g}"
    return f"{optim.lr:g} {optim.warmup_style}", note


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _steps(steps: tuple[int, ...]) -> str:
    if not steps:
        return "never"
    if len(steps) <= 4:
        return "at " + ", ".join(map(str, steps))
    return f"at {steps[0]}, {steps[1]}, {steps[2]}, ... {steps[-1]}"


def render_table(rows: list[Row]) -> str:
    """The table as text, for the terminal and the log."""
    table = Table(title="resolved run", title_justify="left", show_header=False)
    for column in ("name", "value", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.value, row.note)
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(table)
    return out.getvalue()
