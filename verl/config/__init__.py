"""Typed configuration: one frozen dataclass per yaml node, checked at start. Imports no torch and no ray."""

from verl.config.derived import TokenBudgets, clip_range, token_budgets, uses_reference, warmup_steps, world_size
from verl.config.evaluation import EvaluationConfig
from verl.config.generation import GenerationConfig
from verl.config.loader import Resolved, load, resolve, to_dict, to_yaml
from verl.config.plan import BatchPlan, batch_plan, is_due
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.config.table import render_table, resolved_table

__all__ = [
    "BatchPlan",
    "EvaluationConfig",
    "GenerationConfig",
    "PPOConfig",
    "Resolved",
    "SFTConfig",
    "TokenBudgets",
    "batch_plan",
    "clip_range",
    "is_due",
    "load",
    "render_table",
    "resolve",
    "resolved_table",
    "to_dict",
    "to_yaml",
    "token_budgets",
    "uses_reference",
    "warmup_steps",
    "world_size",
]
