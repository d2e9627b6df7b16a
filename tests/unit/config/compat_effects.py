"""What a config makes a run do, as far as that is known before a model is built."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from verl.algorithms.advantage import estimate_groups
from verl.config import PPOConfig, SFTConfig, batch_plan, resolved_table, token_budgets
from verl.config.derived import sft_optim
from verl.config.nodes import FSDPConfig
from verl.protocol import Score
from verl.trainer.ppo.data import dataset_options
from verl.trainer.ray_trainer import Trainer
from verl.workers.actor.build import shard_spec
from verl.workers.actor.engine import ShardSpec
from verl.workers.actor.optim import lr_factor, optim_spec
from verl.workers.actor.worker import policy_objective

ROWS = 4096
_STEPS = 100
_GROUP = [Score.ok(1.0), Score.ok(0.0), Score.ok(0.1)]


def ppo_effects(config: PPOConfig) -> dict[str, Any]:
    """Everything that readers make of a config of ppo_trainer."""
    actor = config.actor_rollout_ref.actor
    run: Any = SimpleNamespace(config=config, step=3)
    run._rng = lambda *args: Trainer._rng(run, *args)
    spec = optim_spec(actor.optim, clip_grad=actor.grad_clip, optimizer_steps=_STEPS)
    return {
        "advantages": [
            a.values.tolist() for a in estimate_groups(config.algorithm.adv_estimator, [_GROUP], [[1, 2, 3]])
        ],
        "plan": batch_plan(config, ROWS),
        "table": resolved_table(config, ROWS),
        "budgets": token_budgets(config),
        "objective": policy_objective(config),
        "optimizer": spec,
        "schedule": [lr_factor(step, spec) for step in range(_STEPS)],
        "training answers": Trainer._sampling(run, validation=False),
        "validation answers": Trainer._sampling(run, validation=True),
        "rows": dataset_options(config),
        "mini-batches": Trainer._cut(run, 8),
        "shards": _shards(actor.fsdp_config),
    }


def _shards(fsdp: FSDPConfig) -> ShardSpec:
    """With switches on auto decided as a small model would have them."""
    decided = replace(
        fsdp,
        param_offload=fsdp.param_offload is True,
        reshard_after_forward=fsdp.reshard_after_forward in (True, "auto"),
    )
    return shard_spec(decided, "cuda", offload=decided.param_offload, trained=True)


def sft_effects(config: SFTConfig) -> dict[str, Any]:
    """Everything that readers make of a config of sft_trainer."""
    spec = optim_spec(sft_optim(config), clip_grad=config.optim.clip_grad, optimizer_steps=_STEPS)
    return {"optimizer": spec, "schedule": [lr_factor(step, spec) for step in range(_STEPS)]}
