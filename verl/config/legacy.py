"""Names and values of verl and of the original TimeMaster that are not keys of ours: one table, old name -> rule.

A pattern may hold `*`; an exact name comes first, then the first pattern that matches. The tables are data:
`verl.config.overrides` applies them to what the user wrote, before hydra composes, and README's table of old
keys is made from them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any


class Level(enum.Enum):
    """What happens to an old name."""

    ALIAS = "alias"
    """Rewritten to a new name that takes effect."""
    WARN = "warn"
    """Accepted, does nothing, and one warning says so."""
    ERROR = "error"
    """Refused at start with the reason."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table."""

    level: Level
    target: str | None
    """ALIAS: the new name; `*` stands for what the pattern's `*` matched."""
    reason: str
    neutral: tuple[Any, ...] = ()
    """Values that ask for what happens anyway; they pass without a word."""
    values: Mapping[Any, str | None] = field(default_factory=dict)
    """ALIAS: old value -> new value as text; None drops the override."""
    switch: str | None = None
    """ALIAS: an old name that must be True beside this one; False drops it, absent a warning says so."""


def alias(
    target: str, reason: str = "", values: Mapping[Any, str | None] | None = None, switch: str | None = None
) -> Rule:
    return Rule(Level.ALIAS, target, reason, values=values or {}, switch=switch)


def warn(reason: str, *neutral: Any) -> Rule:
    return Rule(Level.WARN, None, reason, neutral)


def error(reason: str, *neutral: Any) -> Rule:
    return Rule(Level.ERROR, None, reason, neutral)


def missing(*neutral: Any) -> Rule:
    """A feature that verl has and we do not have yet."""
    return Rule(Level.ERROR, None, "not implemented yet", neutral)


_MEGATRON = "there is no Megatron back end; set actor_rollout_ref.actor.strategy=fsdp2"
_NO_CRITIC = "there is no critic: GRPO takes its baseline from the group"
_NO_REWARD_MODEL = "there is no reward model on GPUs; use custom_reward_function.path"
_BY_BLOCK = "FSDP2 wraps by transformer block"
_HDFS = "nothing is copied to HDFS; trainer.default_local_dir is where outputs go"
_NOTHING_IN_VERL = "it does nothing in verl either"
_ALL_SAVED = "not implemented yet: a checkpoint always holds model, optimizer, counters and a Hugging Face copy"
_CONTENTS = (["model", "optimizer", "extra"], ["model", "optimizer", "extra", "hf_model"], None)
_RUNTIME_ENV = "workers run the code and packages of their node, which must be the driver's (checked at start)"
_NO_REGISTER_CENTRE = "there is no register centre; trainer.ray_wait_timeout limits the wait for nodes"
_V1 = "it belongs to verl's other trainer"


def _overlong(group: str, limit: str | None) -> dict[str, Rule]:
    """DAPO's overlong punishment under one of the names that it had: our length part. `limit` is the longest answer."""
    switch, part = f"{group}.enable", "reward.parts.length"
    rules = {
        switch: alias(f"{part}.kind", "DAPO's overlong punishment", {True: "length", False: None}),
        f"{group}.len": alias(f"{part}.buffer", switch=switch),
        f"{group}.penalty_factor": alias(f"{part}.weight", switch=switch),
        f"{group}.log": warn("every part of the reward is logged", True, False),
    }
    return rules if limit is None else rules | {limit: alias(f"{part}.max_tokens", switch=switch)}


PPO_RULES: dict[str, Rule] = {
    # Megatron, critic, reward model
    "*.megatron.*": warn(_MEGATRON),
    "critic.*": warn(_NO_CRITIC),
    **_overlong("reward_model.overlong_buffer", None),
    **_overlong("reward_model.reward_kwargs.overlong_buffer_cfg", "reward_model.reward_kwargs.max_resp_len"),
    **_overlong("reward.reward_kwargs.overlong_buffer_cfg", "reward.reward_kwargs.max_resp_len"),
    "reward_model.reward_kwargs.*": missing(None),
    "reward.reward_kwargs.*": missing(None),
    "reward_model.*": warn(_NO_REWARD_MODEL),
    # data
    "data.tokenizer": warn("the tokenizer comes from actor_rollout_ref.model.path", None),
    "data.return_raw_input_ids": warn("prompts are tokenised once", False),
    "data.return_raw_chat": warn("prompts are tokenised once", False),
    "data.gen_batch_size": missing(None),
    "data.filter_overlong_prompts_workers": warn("all prompts are tokenised in one batched call", 1, None),
    "data.custom_cls.*": missing(None),
    "data.mm_processor_kwargs": missing({}, None),
    "data.mm_processor_kwargs.min_pixels": alias("data.min_pixels"),
    "data.mm_processor_kwargs.max_pixels": alias("data.max_pixels"),
    "data.mm_processor_kwargs.*": missing(),
    "data.trust_remote_code": alias("actor_rollout_ref.model.trust_remote_code"),
    # model
    "actor_rollout_ref.model.use_fused_kernels": missing(False),
    "actor_rollout_ref.model.fused_kernel_options.*": missing(None),
    "actor_rollout_ref.model.enable_activation_offload": missing(False),
    # actor
    "actor_rollout_ref.actor.use_torch_compile": alias("actor_rollout_ref.actor.fsdp_config.use_torch_compile"),
    "actor_rollout_ref.ref.use_torch_compile": warn("the reference computes as the actor does"),
    "actor_rollout_ref.ref.strategy": warn("the reference runs FSDP2, as the actor does", "fsdp", "fsdp2"),
    "actor_rollout_ref.*.ulysses_sequence_parallel_size": warn("there is no sequence parallelism", 1),
    "actor_rollout_ref.actor.policy_loss.*": missing(None),
    "actor_rollout_ref.actor.calculate_entropy": warn("the entropy is always computed and logged", True),
    "actor_rollout_ref.actor.use_prefix_grouper": warn("the answers of a group always share their prompt", True),
    "actor_rollout_ref.actor.use_fused_kernels": missing(False),
    "actor_rollout_ref.actor.checkpoint.async_save": missing(False),
    "actor_rollout_ref.actor.checkpoint.save_contents": error(_ALL_SAVED, *_CONTENTS),
    "actor_rollout_ref.actor.checkpoint.load_contents": error(_ALL_SAVED, *_CONTENTS),
    "actor_rollout_ref.actor.checkpoint.*": missing(),
    "actor_rollout_ref.actor.entropy_from_logits_with_chunking": warn("the entropy is always made in chunks", True),
    "actor_rollout_ref.actor.entropy_checkpointing": missing(False),
    "actor_rollout_ref.*.fsdp_config.wrap_policy.*": warn(_BY_BLOCK, 0, None),
    "actor_rollout_ref.ref.fsdp_config.reshard_after_forward": warn("the reference is always resharded", True),
    "actor_rollout_ref.actor.fsdp_config.offload_policy": alias(
        "actor_rollout_ref.actor.fsdp_config.param_offload", "FSDP2's offload policy", {False: None}
    ),
    "actor_rollout_ref.ref.fsdp_config.offload_policy": alias(
        "actor_rollout_ref.ref.fsdp_config.param_offload", "FSDP2's offload policy", {False: None}
    ),
    "actor_rollout_ref.*.fsdp_config.forward_prefetch": missing(False),
    "actor_rollout_ref.*.fsdp_config.seed": missing(None),
    "actor_rollout_ref.*.fsdp_config.full_determinism": missing(False),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": alias("actor_rollout_ref.actor.optim.warmup_style"),
    "actor_rollout_ref.actor.optim.clip_grad": alias("actor_rollout_ref.actor.grad_clip"),
    "actor_rollout_ref.actor.optim.optimizer": missing("AdamW"),
    # rollout
    "actor_rollout_ref.rollout.use_fire_sampling": warn("there is no FIRE sampling", False),
    "actor_rollout_ref.rollout.over_sample_rate": warn(_NOTHING_IN_VERL, 0, 0.0),
    "actor_rollout_ref.rollout.multi_stage_wake_up": warn(_NOTHING_IN_VERL, False),
    "actor_rollout_ref.rollout.multi_turn.num_repeat_rollouts": warn(_NOTHING_IN_VERL, None),
    "actor_rollout_ref.rollout.multi_turn.*": missing(False, None),
    "actor_rollout_ref.rollout.agent.custom_async_server": warn(_NOTHING_IN_VERL, None),
    "actor_rollout_ref.rollout.agent.custom_async_server.*": warn(_NOTHING_IN_VERL, None),
    "actor_rollout_ref.rollout.agent.num_workers": missing(),
    "actor_rollout_ref.rollout.mode": warn("answers are scored while others are written in either mode", "sync"),
    "actor_rollout_ref.rollout.calculate_log_probs": warn("the sampler's log-probs are always kept", True),
    "actor_rollout_ref.rollout.logprobs_mode": missing("processed_logprobs"),
    "actor_rollout_ref.rollout.enable_prefix_caching": alias(
        "actor_rollout_ref.rollout.engine_kwargs.vllm.enable_prefix_caching"
    ),
    "actor_rollout_ref.rollout.engine_kwargs.*": missing(None),
    "actor_rollout_ref.rollout.checkpoint_engine.*": missing(),
    "actor_rollout_ref.rollout.quantization": missing(None),
    # algorithm
    "algorithm.filter_groups.enable": missing(False),
    "algorithm.filter_groups.*": missing(None),
    # reward
    "reward.custom_reward_function.*": alias("custom_reward_function.*"),
    "reward.reward_manager.name": alias("reward_model.reward_manager"),
    "reward.reward_manager.max_concurrent": alias("reward.judge.max_concurrent"),
    "reward.reward_manager.max_rpm": alias("reward.judge.max_rpm"),
    "reward.reward_manager.max_tpm": alias("reward.judge.max_tpm"),
    "reward.reward_manager.timeout": alias("reward.timeout"),
    "reward.reward_manager.*": missing(None),
    # trainer and the rest
    "trainer.val_generations_to_log_to_wandb": alias("trainer.log_val_generations"),
    "trainer.remove_previous_ckpt_in_save": alias(
        "trainer.max_actor_ckpt_to_keep",
        "True keeps one, deleted after the next is whole",
        {True: "1", False: None},
    ),
    "trainer.default_hdfs_dir": warn(_HDFS, None),
    "trainer.del_local_ckpt_after_load": warn("a checkpoint is never deleted for having been read", False),
    "trainer.max_critic_ckpt_to_keep": warn(_NO_CRITIC, None),
    "trainer.ray_wait_register_center_timeout": warn(_NO_REGISTER_CENTRE),
    "trainer.esi_redundant_time": warn("there is no expiring instance to save for", 0),
    "trainer.use_v1": warn(_V1, False),
    "trainer.v1.*": warn(_V1),
    "ray_init.timeline_json_file": missing(None),
    "ray_init.*": alias("ray_kwargs.ray_init.*"),
    "ray_kwargs.timeline_json_file": missing(None),
    "ray_kwargs.ray_init.local_mode": error("every rank is a process of its own", False),
    "ray_kwargs.ray_init.ignore_reinit_error": warn("Ray is started once", True, False),
    "ray_kwargs.ray_init.runtime_env.working_dir": error(_RUNTIME_ENV, None),
    "ray_kwargs.ray_init.runtime_env.pip": error(_RUNTIME_ENV, None),
    "ray_kwargs.ray_init.runtime_env.conda": error(_RUNTIME_ENV, None),
    "ray_kwargs.ray_init.runtime_env.py_modules": error(_RUNTIME_ENV, None),
    "global_profiler.*": missing(None),
    "hydra.*": warn("hydra's own output folder is not used; see trainer.default_local_dir"),
}

SFT_RULES: dict[str, Rule] = {
    "data.micro_batch_size": alias("data.micro_batch_size_per_gpu", values={None: None}),
    "data.balance_dp_token": warn("batches are always balanced by cost"),
    "data.chat_template": warn("the chat template comes from the model", None),
    "model.fsdp_config.cpu_offload": warn("use model.fsdp_config.param_offload and optimizer_offload", False),
    "model.fsdp_config.offload_params": warn("use model.fsdp_config.param_offload", False),
    "model.fsdp_config.wrap_policy.*": warn(_BY_BLOCK, 0, None),
    "ulysses_sequence_parallel_size": warn("there is no sequence parallelism", 1),
    "use_remove_padding": warn("the packed forward is the only one", True),
    "trainer.default_hdfs_dir": warn(_HDFS, None),
    "hydra.*": warn("hydra's own output folder is not used; see trainer.default_local_dir"),
}

_WORKERS = "actor_rollout_ref."


def _rollout_alone() -> dict[str, Rule]:
    """The rules of the rollout, for a program whose config has no other workers."""
    found = {name: rule for name, rule in PPO_RULES.items() if name.startswith(f"{_WORKERS}rollout.")}
    return {
        name.removeprefix(_WORKERS): replace(rule, target=rule.target and rule.target.removeprefix(_WORKERS))
        for name, rule in found.items()
    }


GENERATION_RULES: dict[str, Rule] = {
    "actor.*": warn("nothing is trained here"),
    **_rollout_alone(),
    "trainer.project_name": warn("nothing is tracked here"),
    "trainer.ray_wait_register_center_timeout": warn(_NO_REGISTER_CENTRE),
    "trainer.experiment_name": warn("nothing is tracked here"),
    "hydra.*": warn("hydra's own output folder is not used; see data.output_path"),
    "ray_init.*": warn("Ray is started as for training; set RAY_ADDRESS to join a cluster"),
    "ray_kwargs.*": warn("Ray is started as for training; set RAY_ADDRESS to join a cluster"),
}

EVALUATION_RULES: dict[str, Rule] = {
    "reward.custom_reward_function.*": alias("custom_reward_function.*"),
    "hydra.*": warn("hydra's own output folder is not used"),
    "ray_init.*": warn("scoring runs in this process"),
    "ray_kwargs.*": warn("scoring runs in this process"),
}

_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
_DTYPES = {short: long for long, short in _PRECISIONS.items()} | {"half": "float16", "float": "float32"}
_TO_PRECISION = {old: alias(new) for old, new in _PRECISIONS.items()}
_TO_DTYPE = {old: alias(new) for old, new in _DTYPES.items()}
_FSDP = ("model_dtype", "mixed_precision.param_dtype", "mixed_precision.reduce_dtype", "mixed_precision.buffer_dtype")
_GRPO = "set algorithm.adv_estimator=grpo"

PPO_VALUES: dict[str, dict[Any, Rule]] = {
    "algorithm.adv_estimator": {
        "gae": error(f"gae needs a critic, and there is none; {_GRPO}"),
        "remax": error(f"not implemented yet; {_GRPO}"),
    },
    "algorithm.kl_penalty": {"full": error("not implemented; set algorithm.kl_penalty=kl or low_var_kl")},
    "actor_rollout_ref.actor.strategy": {"megatron": error(_MEGATRON)},
    "actor_rollout_ref.rollout.name": {"sglang": error("not supported; set actor_rollout_ref.rollout.name=vllm or hf")},
    "actor_rollout_ref.rollout.load_format": {"dummy*": alias("dummy")},
    "actor_rollout_ref.rollout.dtype": _TO_DTYPE,
    **{f"actor_rollout_ref.actor.fsdp_config.{name}": _TO_PRECISION for name in _FSDP},
    "reward_model.enable": {True: error(_NO_REWARD_MODEL)},
    "trainer.resume_from_path": {
        False: alias("null"),
        True: error("name the folder: trainer.resume_from_path=.../global_step_N with trainer.resume_mode=resume_path"),
    },
}

SFT_VALUES: dict[str, dict[Any, Rule]] = {
    "rollout.name": PPO_VALUES["actor_rollout_ref.rollout.name"],
    "rollout.dtype": _TO_DTYPE,
    **{f"model.fsdp_config.{name}": _TO_PRECISION for name in _FSDP},
}


GENERATION_VALUES: dict[str, dict[Any, Rule]] = {
    f"rollout.{name}": PPO_VALUES[f"actor_rollout_ref.rollout.{name}"] for name in ("name", "load_format", "dtype")
}


def find_rule(key: str, rules: Mapping[str, Rule]) -> tuple[str, Rule] | None:
    """The pattern and rule for an old name: an exact name before a pattern, then the table's order."""
    if key in rules:
        return key, rules[key]
    return next(((p, rule) for p, rule in rules.items() if "*" in p and fnmatchcase(key, p)), None)


def find_value_rule(key: str, value: Any, rules: Mapping[str, Mapping[Any, Rule]]) -> Rule | None:
    """The rule for an old value of a key that we have."""
    for old, rule in rules.get(key, {}).items():
        same = type(old) is type(value) and old == value
        if same or (isinstance(old, str) and isinstance(value, str) and "*" in old and fnmatchcase(value, old)):
            return rule
    return None


def is_neutral(value: Any, rule: Rule) -> bool:
    """Whether the value asks for what happens anyway. True is not 1 here, but 1 is 1.0, and lists have no order."""
    return any(isinstance(value, bool) == isinstance(n, bool) and _plain(value) == _plain(n) for n in rule.neutral)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
