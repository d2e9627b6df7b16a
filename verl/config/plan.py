"""The batch rules as numbers: how many steps, samples, validations and saves one run has.

`ppo_mini_batch_size` and `train_batch_size` count prompts, `*_per_gpu` counts samples. Rows that do not fill a batch
are left out of their epoch (`drop_last`). Nothing is rounded without being shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.derived import world_size
from verl.config.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Counts of one run. Example: 250 rows, 64 prompts x 5 answers on 4 GPUs, 100 epochs -> 300 steps."""

    prompts_per_step: int
    samples_per_step: int
    samples_per_gpu: float
    """Mean; groups are spread by cost, so it need not be whole."""
    optimizer_steps_per_step: int
    samples_per_optimizer_step: int
    steps_per_epoch: int
    unused_rows_per_epoch: int
    total_steps: int
    update_steps: int
    """Steps in which the actor is updated (from `critic_warmup` on)."""
    rollouts: int
    """Training answers of the whole run."""
    validated_at: tuple[int, ...]
    """Steps with a validation; 0 is the one before training."""
    saved_at: tuple[int, ...]
    tokens_per_rank: float
    """Largest mean number of tokens a rank meets in one pass over a step, prompts counted once per group."""

    @property
    def validations(self) -> int:
        return len(self.validated_at)

    @property
    def optimizer_steps(self) -> int:
        return self.optimizer_steps_per_step * self.update_steps


def batch_plan(config: PPOConfig, n_train_rows: int) -> BatchPlan:
    """Counts for `n_train_rows` rows left after filtering. Raises ValueError when they do not fill one batch."""
    data, trainer, actor = config.data, config.trainer, config.actor_rollout_ref.actor
    prompts, answers, ranks = data.train_batch_size, config.actor_rollout_ref.rollout.n, world_size(config)
    if n_train_rows < prompts:
        raise ValueError(
            f"data.train_files hold {n_train_rows} usable rows, fewer than data.train_batch_size={prompts}: there would"
            f" be no step; set data.train_batch_size to at most {n_train_rows}"
        )
    per_epoch = n_train_rows // prompts
    total = trainer.total_training_steps or per_epoch * trainer.total_epochs
    return BatchPlan(
        prompts_per_step=prompts,
        samples_per_step=prompts * answers,
        samples_per_gpu=prompts * answers / ranks,
        optimizer_steps_per_step=actor.ppo_epochs * prompts // actor.ppo_mini_batch_size,
        samples_per_optimizer_step=actor.ppo_mini_batch_size * answers,
        steps_per_epoch=per_epoch,
        unused_rows_per_epoch=n_train_rows % prompts,
        total_steps=total,
        update_steps=max(0, total - max(trainer.critic_warmup, 1) + 1),
        rollouts=prompts * answers * total,
        validated_at=(0,) * trainer.val_before_train + steps_at(trainer.test_freq, total),
        saved_at=steps_at(trainer.save_freq, total),
        tokens_per_rank=prompts * (data.max_prompt_length + answers * data.max_response_length) / ranks,
    )


def steps_at(frequency: int, total: int) -> tuple[int, ...]:
    """Every `frequency` steps and the last one; none when `frequency` <= 0."""
    if frequency <= 0:
        return ()
    return tuple(dict.fromkeys([*range(frequency, total + 1, frequency), total]))


def is_due(frequency: int, step: int, total: int) -> bool:
    """Whether `step` (from 1) is one of `steps_at`."""
    return frequency > 0 and (step % frequency == 0 or step == total)
