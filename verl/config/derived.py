"""What several readers need and nobody should compute twice: world size, token budgets, clip range, KL terms, schedule.

Invariants
- A micro-batch size of k samples is a budget of k x (prompt + response limit) tokens, and never changes a result.
- A size over all GPUs divides by the number of ranks, or it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from verl.config.generation import GenerationConfig
from verl.config.nodes import ActorConfig, ModelConfig, OptimConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig, SFTModelConfig


@dataclass(frozen=True, slots=True)
class TokenBudgets:
    """Largest number of tokens of one micro-batch on one rank."""

    update: int
    old_log_prob: int
    ref_log_prob: int | None
    """None: no reference is built."""


def world_size(config: PPOConfig | SFTConfig) -> int:
    """Number of actor ranks."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def sequence_limit(config: PPOConfig) -> int:
    """Longest prompt + answer in tokens."""
    return config.data.max_prompt_length + config.data.max_response_length


def uses_reference(config: PPOConfig) -> bool:
    """Whether a KL term is on; without one no reference model is built."""
    return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward


def uses_adapters(model: ModelConfig | SFTModelConfig) -> bool:
    """Whether adapters (LoRA) are trained in place of the weights."""
    return model.lora_rank > 0 or model.lora_adapter_path is not None


def clip_range(actor: ActorConfig) -> tuple[float, float]:
    """Clip below and above 1; a null side is `clip_ratio`."""
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    return (actor.clip_ratio if low is None else low, actor.clip_ratio if high is None else high)


def micro_batch_tokens(
    *, node: str, total: int | None, per_gpu: int | None, dynamic: bool, max_tokens: int, ranks: int, longest: int
) -> int:
    """Tokens of one micro-batch. `node` is the keys' common beginning, for errors.

    Raises ValueError when the sizes contradict each other, are absent, or would be rounded.
    """
    key = f"{node}micro_batch_size"
    if total is not None and per_gpu is not None:
        raise ValueError(f"{key}={total} and {key}_per_gpu={per_gpu} are both set; keep {key}_per_gpu")
    if dynamic:
        if max_tokens < longest:
            raise ValueError(
                f"{node}max_token_len_per_gpu={max_tokens} is less than data.max_prompt_length +"
                f" data.max_response_length = {longest}, one sequence; raise it to at least {longest}"
            )
        return max_tokens
    if total is not None:
        if total % ranks:
            raise ValueError(f"{key}={total} does not divide by {ranks} ranks; set {key}_per_gpu instead")
        per_gpu = total // ranks
    if per_gpu is None:
        dynamic_key = f"{node.removesuffix('ppo_')}use_dynamic_bsz"
        raise ValueError(f"{key}_per_gpu is not set; set it (samples per forward on a GPU), or {dynamic_key}=True")
    if per_gpu < 1:
        raise ValueError(f"{key}_per_gpu={per_gpu} must be at least 1")
    return per_gpu * longest


def update_tokens(config: PPOConfig) -> int:
    """Token budget of the actor's update. Raises ValueError as `micro_batch_tokens`."""
    actor = config.actor_rollout_ref.actor
    return micro_batch_tokens(
        node="actor_rollout_ref.actor.ppo_",
        total=actor.ppo_micro_batch_size,
        per_gpu=actor.ppo_micro_batch_size_per_gpu,
        dynamic=actor.use_dynamic_bsz,
        max_tokens=actor.ppo_max_token_len_per_gpu,
        ranks=world_size(config),
        longest=sequence_limit(config),
    )


def log_prob_tokens(config: PPOConfig, *, reference: bool) -> int:
    """Token budget of a no-grad forward. Raises ValueError as `micro_batch_tokens`."""
    workers = config.actor_rollout_ref
    node = workers.ref if reference else workers.rollout
    return micro_batch_tokens(
        node=f"actor_rollout_ref.{'ref' if reference else 'rollout'}.log_prob_",
        total=node.log_prob_micro_batch_size,
        per_gpu=node.log_prob_micro_batch_size_per_gpu,
        dynamic=node.log_prob_use_dynamic_bsz,
        max_tokens=node.log_prob_max_token_len_per_gpu,
        ranks=world_size(config),
        longest=sequence_limit(config),
    )


def token_budgets(config: PPOConfig) -> TokenBudgets:
    """All three budgets. Raises ValueError as `micro_batch_tokens`."""
    return TokenBudgets(
        update=update_tokens(config),
        old_log_prob=log_prob_tokens(config, reference=False),
        ref_log_prob=log_prob_tokens(config, reference=True) if uses_reference(config) else None,
    )


def warmup_steps(optim: OptimConfig, total_optimizer_steps: int) -> int:
    """Length of the linear warm-up in optimizer steps."""
    if optim.lr_warmup_steps >= 0:
        return optim.lr_warmup_steps
    return int(optim.lr_warmup_steps_ratio * total_optimizer_steps)


def max_context(config: PPOConfig) -> int:
    """Longest prompt + answer that the rollout engine may write."""
    limit = config.actor_rollout_ref.rollout.max_model_len
    return sequence_limit(config) if limit is None else limit


def sft_resume_mode(config: SFTConfig) -> str:
    """`resume_path` where a path is given and no mode was asked for: verl's supervised trainer has that key alone."""
    trainer = config.trainer
    named = trainer.resume_path is not None and trainer.resume_mode == "auto"
    return "resume_path" if named else trainer.resume_mode


def sft_optim(config: SFTConfig) -> OptimConfig:
    """SFT's optimizer keys under the actor's names, for the one engine."""
    optim = config.optim
    return OptimConfig(
        lr=optim.lr,
        lr_warmup_steps=-1,
        lr_warmup_steps_ratio=optim.warmup_steps_ratio,
        warmup_style=optim.lr_scheduler,
        min_lr_ratio=optim.min_lr_ratio,
        num_cycles=0.5,
        total_training_steps=-1,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
    )


def sft_model(config: SFTConfig) -> ModelConfig:
    """SFT's model keys under the actor's names, for the one engine."""
    model = config.model
    return ModelConfig(
        path=model.partial_pretrain,
        external_lib=model.external_lib,
        trust_remote_code=model.trust_remote_code,
        override_config=model.override_config,
        enable_gradient_checkpointing=model.enable_gradient_checkpointing,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules,
        lora_adapter_path=model.lora_adapter_path,
        use_liger=model.use_liger,
        use_remove_padding=True,
    )


def generation_engine(config: GenerationConfig, base: PPOConfig) -> PPOConfig:
    """The config that rollout workers are built from: `base` with this model, engine, device and limits."""
    workers, limits = base.actor_rollout_ref, config.rollout
    model = replace(
        workers.model,
        path=config.model.path,
        external_lib=config.model.external_lib,
        trust_remote_code=config.model.trust_remote_code,
        override_config=config.model.override_config,
    )
    data = replace(base.data, max_prompt_length=limits.prompt_length, max_response_length=limits.response_length)
    trainer = replace(
        base.trainer,
        device=config.trainer.device,
        nnodes=config.trainer.nnodes,
        n_gpus_per_node=config.trainer.n_gpus_per_node,
        ray_wait_timeout=config.trainer.ray_wait_timeout,
        val_only=True,
    )
    return replace(
        base, data=data, trainer=trainer, actor_rollout_ref=replace(workers, model=model, rollout=config.rollout)
    )


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ between two resolved configs, as `key: old -> new`; resume keys are left out."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        key, was, is_now = f"{prefix}{name}", old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            lines += config_differences(was, is_now, f"{key}.")
        elif not name.startswith("resume_") and json.dumps(was, default=str) != json.dumps(is_now, default=str):
            lines.append(f"{key}: {was} -> {is_now}")
    return lines
