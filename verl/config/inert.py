"""Known keys that have no effect in this run, and other advice: warnings, never errors.

Invariant: a key is reported only when the user set it; a default is never warned about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from verl.config.derived import sft_resume_mode, uses_adapters, uses_reference
from verl.config.evaluation import EvaluationConfig
from verl.config.generation import GenerationConfig
from verl.config.nodes import FSDPConfig, ModelConfig, RolloutConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig, SFTModelConfig

Inert = Iterator[tuple[str, str]]
"""(key, why it has no effect); a key that ends in `.` means everything below it."""

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_REF = "actor_rollout_ref.ref"
_VLLM_ONLY = (
    "tensor_model_parallel_size",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_chunked_prefill",
    "free_cache_engine",
    "load_format",
    "max_num_seqs",
    "max_num_batched_tokens",
    "disable_log_stats",
    "cudagraph_capture_sizes",
    "engine_kwargs.",
)
_TRAINING_ONLY = (
    "log_prob_micro_batch_size",
    "log_prob_micro_batch_size_per_gpu",
    "log_prob_use_dynamic_bsz",
    "log_prob_max_token_len_per_gpu",
)
_VLLM_ON_GPU = (
    "gpu_memory_utilization",
    "enforce_eager",
    "free_cache_engine",
    "load_format",
    "cudagraph_capture_sizes",
)


def inert_ppo(config: PPOConfig, user_set: Mapping[str, str]) -> list[str]:
    """One line for each key of `user_set` (key -> the value as written) that this run does not use, then advice."""
    sources = (
        _untrained(config),
        _engine(config),
        _kl(config),
        _actor(config),
        _sizes(config),
        _trainer(config),
        _reward(config),
    )
    return [*_select((pair for source in sources for pair in source), user_set), *_advice_ppo(config)]


def inert_sft(config: SFTConfig, user_set: Mapping[str, str]) -> list[str]:
    """One line for each key of `user_set` (key -> the value as written) that this run does not use."""
    return _select(_sft(config), user_set)


def inert_evaluation(config: EvaluationConfig, user_set: Mapping[str, str]) -> list[str]:
    """One line for each key of `user_set` (key -> the value as written) that this run does not use."""
    return _select(_custom_reward(config), user_set)


def _custom_reward(config: EvaluationConfig) -> Inert:
    if config.custom_reward_function.path is None:
        yield "custom_reward_function.name", "custom_reward_function.path is null"
        yield "custom_reward_function.reward_kwargs.", "custom_reward_function.path is null"
    else:
        yield "reward.format", "custom_reward_function.path replaces the task's own reward"


def _select(pairs: Inert, user_set: Mapping[str, str]) -> list[str]:
    lines: dict[str, str] = {}
    for key, reason in pairs:
        hit = sorted(k for k in user_set if k == key or (key.endswith(".") and k.startswith(key)))
        for name in hit:
            lines.setdefault(name, f"{name}={user_set[name]} has no effect: {reason}")
    return list(lines.values())


def _untrained(config: PPOConfig) -> Inert:
    named = config.trainer.resume_mode not in ("auto", "disable")  # a checkpoint, whose adapters are then loaded
    if config.trainer.val_only and not named and config.actor_rollout_ref.model.lora_adapter_path is None:
        yield (
            "actor_rollout_ref.model.lora_rank",
            "trainer.val_only=True trains nothing, and a new adapter changes nothing",
        )


def inert_generation(config: GenerationConfig, user_set: Mapping[str, str]) -> list[str]:
    """One line for each key of `user_set` (key -> the value as written) that this run does not use."""
    return _select(_generation(config), user_set)


def _generation(config: GenerationConfig) -> Inert:
    for name in _TRAINING_ONLY:
        yield f"rollout.{name}", "nothing is trained here"
    for name in ("nnodes", "n_gpus_per_node"):
        yield f"rollout.{name}", "there is no actor beside the engines; trainer.* sizes them"
    if not config.rollout.do_sample:
        for name in ("temperature", "top_k", "top_p"):
            yield f"rollout.{name}", "rollout.do_sample=False is greedy"
    if config.rollout.load_format != "auto":
        yield "rollout.load_format", "the engines read the weights from model.path"
    yield "rollout.checkpoint_engine.", "the engines read the weights from model.path"
    yield "rollout.val_kwargs.", "rollout.* itself says how to draw"
    yield from _of_the_other_engine("rollout", config.rollout, config.trainer.device)


def _of_the_other_engine(node: str, rollout: RolloutConfig, device: str) -> Inert:
    if rollout.name == "hf":
        for name in _VLLM_ONLY:
            yield f"{node}.{name}", f"{node}.name=hf does not use it"
        return
    yield f"{node}.hf_batch_size", f"{node}.name={rollout.name} does not use it"
    for name in _VLLM_ON_GPU if device == "cpu" else ():
        yield f"{node}.{name}", "trainer.device=cpu has neither GPU memory nor CUDA graphs"
    if rollout.enforce_eager:
        yield f"{node}.cudagraph_capture_sizes", f"{node}.enforce_eager=True captures no graphs"


def _engine(config: PPOConfig) -> Inert:
    rollout = config.actor_rollout_ref.rollout
    yield from _of_the_other_engine(_ROLLOUT, rollout, config.trainer.device)
    if config.actor_rollout_ref.hybrid_engine:
        reason = "actor_rollout_ref.hybrid_engine=True puts the rollout on the actor's GPUs"
        yield f"{_ROLLOUT}.nnodes", reason
        yield f"{_ROLLOUT}.n_gpus_per_node", reason
    if not rollout.val_kwargs.do_sample or rollout.val_kwargs.temperature == 0:
        for name in ("temperature", "top_k", "top_p") if not rollout.val_kwargs.do_sample else ("top_k", "top_p"):
            yield f"{_ROLLOUT}.val_kwargs.{name}", "validation answers are greedy"
    yield from _adapters("actor_rollout_ref.model", config.actor_rollout_ref.model)
    if not config.actor_rollout_ref.model.use_remove_padding:
        yield "actor_rollout_ref.model.use_remove_padding", "the packed forward is the only one"


def _adapters(node: str, model: ModelConfig | SFTModelConfig) -> Inert:
    shape = ("lora_alpha", "target_modules", "exclude_modules")
    if model.lora_adapter_path is not None:
        for name in ("lora_rank", *shape):
            yield f"{node}.{name}", f"the adapter in {node}.lora_adapter_path decides"
    elif model.lora_rank == 0:
        for name in shape:
            yield f"{node}.{name}", f"{node}.lora_rank=0: there are no adapters"


def _kl(config: PPOConfig) -> Inert:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if not algorithm.use_kl_in_reward:
        reason = "KL is a loss term here" if actor.use_kl_loss else "algorithm.use_kl_in_reward=False"
        yield "algorithm.kl_penalty", reason
        yield "algorithm.kl_ctrl.", reason
    elif algorithm.kl_ctrl.type == "fixed":
        for name in ("horizon", "target_kl"):
            yield f"algorithm.kl_ctrl.{name}", "algorithm.kl_ctrl.type=fixed"
    if not actor.use_kl_loss:
        for name in ("kl_loss_coef", "kl_loss_type"):
            yield f"{_ACTOR}.{name}", f"{_ACTOR}.use_kl_loss=False"
    if not uses_reference(config):
        yield f"{_REF}.", "no KL term is on, so no reference model is built"
    elif uses_adapters(config.actor_rollout_ref.model):
        yield f"{_REF}.fsdp_config.", "the reference is the actor without its adapters"
    correction = algorithm.rollout_correction
    if correction.rollout_is is None:
        yield "algorithm.rollout_correction.rollout_is_threshold", "algorithm.rollout_correction.rollout_is is null"
    elif correction.bypass_mode and correction.loss_type == "ppo_clip":
        reason = "bypass_mode=True with loss_type=ppo_clip clips the ratio to the sampler instead"
        for name in ("rollout_is", "rollout_is_threshold"):
            yield f"algorithm.rollout_correction.{name}", reason
    if correction.rollout_rs is None:
        yield "algorithm.rollout_correction.rollout_rs_threshold", "algorithm.rollout_correction.rollout_rs is null"
    if not correction.bypass_mode:
        yield "algorithm.rollout_correction.loss_type", "algorithm.rollout_correction.bypass_mode=False"
    estimator = f"algorithm.adv_estimator={config.algorithm.adv_estimator}"
    for name in ("gamma", "lam"):
        yield f"algorithm.{name}", f"{estimator} gives every token of an answer the same advantage"
    if config.algorithm.adv_estimator != "grpo":
        yield "algorithm.norm_adv_by_std_in_grpo", estimator


def _actor(config: PPOConfig) -> Inert:
    actor = config.actor_rollout_ref.actor
    if actor.clip_ratio_low is not None and actor.clip_ratio_high is not None:
        yield f"{_ACTOR}.clip_ratio", "clip_ratio_low and clip_ratio_high are both set"
    if actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield f"{_ACTOR}.loss_scale_factor", f"{_ACTOR}.loss_agg_mode={actor.loss_agg_mode} has no scale"
    if actor.optim.lr_warmup_steps >= 0:
        yield f"{_ACTOR}.optim.lr_warmup_steps_ratio", f"lr_warmup_steps={actor.optim.lr_warmup_steps} comes first"
    if actor.optim.warmup_style == "constant":
        for name in ("min_lr_ratio", "num_cycles"):
            yield f"{_ACTOR}.optim.{name}", f"{_ACTOR}.optim.warmup_style=constant"
    if not actor.shuffle:
        yield f"{_ACTOR}.data_loader_seed", f"{_ACTOR}.shuffle=False"
    if actor.policy_loss.loss_mode != "vanilla":
        yield f"{_ACTOR}.clip_ratio_c", f"{_ACTOR}.policy_loss.loss_mode={actor.policy_loss.loss_mode} has no dual clip"
    yield from _device(f"{_ACTOR}.fsdp_config", actor.fsdp_config, config.trainer.device)


def _device(node: str, fsdp: FSDPConfig, device: str) -> Inert:
    if fsdp.use_torch_compile and device == "cpu":
        yield f"{node}.use_torch_compile", "trainer.device=cpu: only what runs on CUDA is compiled"
    on_host = {"param_offload": fsdp.param_offload, "optimizer_offload": fsdp.optimizer_offload}
    for name in (name for name, asked in on_host.items() if asked is True and device == "cpu"):
        yield f"{node}.{name}", "trainer.device=cpu has no other memory than the host's"
    if fsdp.optimizer_offload is True and fsdp.param_offload is True:
        yield f"{node}.optimizer_offload", f"{node}.param_offload=True keeps the optimizer state on the host already"


def _sizes(config: PPOConfig) -> Inert:
    actor, workers = config.actor_rollout_ref.actor, config.actor_rollout_ref
    nodes = [(f"{_ACTOR}.ppo_", f"{_ACTOR}.use_dynamic_bsz", actor.use_dynamic_bsz)]
    for node, values in ((_ROLLOUT, workers.rollout), (_REF, workers.ref)):
        nodes.append((f"{node}.log_prob_", f"{node}.log_prob_use_dynamic_bsz", values.log_prob_use_dynamic_bsz))
    for begin, switch, dynamic in nodes:
        names = ("micro_batch_size", "micro_batch_size_per_gpu") if dynamic else ("max_token_len_per_gpu",)
        for name in names:
            yield f"{begin}{name}", f"{switch}={dynamic}"
    if not config.data.shuffle:
        yield "data.seed", "data.shuffle=False"


def _trainer(config: PPOConfig) -> Inert:
    trainer = config.trainer
    if trainer.total_training_steps is not None:
        yield "trainer.total_epochs", f"trainer.total_training_steps={trainer.total_training_steps} is set"
    if trainer.resume_mode != "resume_path" and trainer.resume_from_path is not None:
        yield "trainer.resume_from_path", f"trainer.resume_mode={trainer.resume_mode}"
    if not trainer.keep_best:
        yield "trainer.best_metric", "trainer.keep_best=False"
    elif trainer.test_freq <= 0:
        yield "trainer.keep_best", f"trainer.test_freq={trainer.test_freq}: nothing is validated during training"
    if trainer.val_only and not trainer.val_before_train:
        yield "trainer.val_before_train", "trainer.val_only=True is a validation"


def _reward(config: PPOConfig) -> Inert:
    if config.custom_reward_function.path is None:
        yield "custom_reward_function.name", "custom_reward_function.path is null"
        yield "custom_reward_function.reward_kwargs.", "custom_reward_function.path is null"
    else:
        reason = "custom_reward_function.path replaces the task's own reward"
        yield "reward.format", reason
        for name, settings in config.reward.parts.items():
            kind = settings.get("kind", name) if isinstance(settings, Mapping) else None
            if kind != "length":
                for key in (f"reward.parts.{name}", f"reward.parts.{name}."):
                    yield key, f"{reason}, to which only length parts are added"
    if not config.reward.judge.enable:
        yield "reward.judge.", "reward.judge.enable=False"


def _advice_ppo(config: PPOConfig) -> Iterator[str]:
    actor, data, trainer = config.actor_rollout_ref.actor, config.data, config.trainer
    if trainer.val_only:
        return
    if actor.use_kl_loss and actor.kl_loss_type in ("kl", "k1"):
        kind = f"{_ACTOR}.kl_loss_type={actor.kl_loss_type}"
        yield f"{kind}: as a loss its gradient has mean zero; use k2 or low_var_kl (k3)"
    rollout = config.actor_rollout_ref.rollout
    if rollout.top_k > 0 or rollout.top_p < 1:
        yield (
            f"{_ROLLOUT}.top_k={rollout.top_k}, top_p={rollout.top_p}: answers come from a cut distribution; the"
            " correction weighs what was drawn, but what cannot be drawn is never learned"
        )
    named_test = [path for path in data.val_files if "test" in Path(path).stem.lower()]
    if trainer.keep_best and trainer.test_freq > 0 and named_test:
        yield (
            f"data.val_files={named_test[0]} looks like a test split, and chooses the best checkpoint;"
            " validate on other rows, or set trainer.keep_best=False"
        )
    seen = {Path(path).resolve() for path in data.train_files}
    for name, paths in (("val", data.val_files), ("test", data.test_files or ())):
        if seen & {Path(path).resolve() for path in paths}:
            yield f"data.{name}_files and data.train_files share a file: the model is scored on rows it is trained on"


def _sft(config: SFTConfig) -> Inert:
    rollout, trainer = config.rollout, config.trainer
    yield from _adapters("model", config.model)
    if rollout.name != "hf":
        yield "rollout.hf_batch_size", f"rollout.name={rollout.name} does not use it"
    if not rollout.do_sample:
        for name in ("temperature", "top_k", "top_p"):
            yield f"rollout.{name}", "rollout.do_sample=False is greedy"
    yield from _device("model.fsdp_config", config.model.fsdp_config, trainer.device)
    if config.optim.lr_scheduler == "constant":
        yield "optim.min_lr_ratio", "optim.lr_scheduler=constant"
    if not config.data.shuffle:
        yield "data.seed", "data.shuffle=False"
    if trainer.total_training_steps is not None:
        yield "trainer.total_epochs", f"trainer.total_training_steps={trainer.total_training_steps} is set"
    if sft_resume_mode(config) != "resume_path":
        yield "trainer.resume_path", f"trainer.resume_mode={trainer.resume_mode}"
    if config.custom_reward_function.path is None:
        yield "custom_reward_function.name", "custom_reward_function.path is null"
        yield "custom_reward_function.reward_kwargs.", "custom_reward_function.path is null"
