"""Rules that span keys. Each returns messages that name the key to change; `verl.config.loader` raises them together.

Rules of training alone are skipped with `trainer.val_only=True`: an evaluation needs no mini-batches.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from verl.config.derived import (
    clip_range,
    log_prob_tokens,
    sequence_limit,
    sft_resume_mode,
    update_tokens,
    uses_reference,
    world_size,
)
from verl.config.engine_kwargs import engine_kwargs_problems
from verl.config.hdfs import no_input, no_output
from verl.config.nodes import FSDPConfig, ModelConfig, RolloutConfig, SamplingConfig, ScoringConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig, SFTModelConfig, SFTRolloutConfig

Problems = Iterator[str]

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_CORRECTION = "algorithm.rollout_correction"
_STEP_FOLDER = re.compile(r"(^|/)global_step_\d+/?$")


def check_ppo(config: PPOConfig) -> list[str]:
    """Every problem of the config, [] when it can run."""
    rules: list[Callable[[PPOConfig], Problems]] = [
        _sizes,
        _ray,
        _placement,
        _paths,
        _adapters,
        _sampling,
        _kl,
        _trainer,
    ]
    if not config.trainer.val_only:
        rules += [_batches, _micro_batches, _training_sampling, _correction, _losses, _optim]
    return [problem for rule in rules for problem in rule(config)]


def check_sft(config: SFTConfig) -> list[str]:
    """Every problem of the config, [] when it can run."""
    rules: list[Callable[[SFTConfig], Problems]] = [_sft_data, _sft_optim, _sft_trainer]
    return [problem for rule in rules for problem in rule(config)]


def _positive(**values: float | None) -> Problems:
    """Keys are written with `__` for a dot; null passes."""
    for name, value in values.items():
        if value is not None and value <= 0:
            yield f"{name.replace('__', '.')}={value} must be greater than 0"


def _between(key: str, value: float, low: float, high: float) -> Problems:
    if not low <= value <= high:
        yield f"{key}={value} must be between {low:g} and {high:g}"


def _sizes(config: PPOConfig) -> Problems:
    data, rollout, trainer = config.data, config.actor_rollout_ref.rollout, config.trainer
    if data.dataloader_num_workers is not None and data.dataloader_num_workers < 0:
        yield f"data.dataloader_num_workers={data.dataloader_num_workers} must not be negative"
    yield from _positive(
        data__train_batch_size=data.train_batch_size,
        data__val_batch_size=data.val_batch_size,
        data__max_prompt_length=data.max_prompt_length,
        data__max_response_length=data.max_response_length,
        trainer__nnodes=trainer.nnodes,
        trainer__n_gpus_per_node=trainer.n_gpus_per_node,
        actor_rollout_ref__rollout__n=rollout.n,
        actor_rollout_ref__rollout__val_kwargs__n=rollout.val_kwargs.n,
        actor_rollout_ref__rollout__hf_batch_size=rollout.hf_batch_size,
        actor_rollout_ref__rollout__max_num_seqs=rollout.max_num_seqs,
        actor_rollout_ref__rollout__checkpoint_engine__update_weights_bucket_megabytes=(
            rollout.checkpoint_engine.update_weights_bucket_megabytes
        ),
        actor_rollout_ref__rollout__max_num_batched_tokens=rollout.max_num_batched_tokens,
        actor_rollout_ref__rollout__tensor_model_parallel_size=rollout.tensor_model_parallel_size,
    )
    yield from _pixels(data.min_pixels, data.max_pixels)
    tp = rollout.tensor_model_parallel_size
    if config.actor_rollout_ref.hybrid_engine and rollout.name == "vllm" and tp > 0 and trainer.n_gpus_per_node % tp:
        gpus = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
        yield f"{_ROLLOUT}.tensor_model_parallel_size={tp} does not divide {gpus}"
    if rollout.name == "vllm" and tp > 1 and trainer.device == "cpu":
        reason = "cuts the model over GPUs, and trainer.device=cpu has none; set it to 1"
        yield f"{_ROLLOUT}.tensor_model_parallel_size={tp} {reason}"
    if rollout.cudagraph_capture_sizes is not None and min(rollout.cudagraph_capture_sizes, default=0) < 1:
        sizes = list(rollout.cudagraph_capture_sizes)
        yield f"{_ROLLOUT}.cudagraph_capture_sizes={sizes} must be batch sizes of at least 1, or null"
    for own, key in (("prompt_length", "max_prompt_length"), ("response_length", "max_response_length")):
        if getattr(rollout, own) != getattr(data, key):
            yield f"{_ROLLOUT}.{own}={getattr(rollout, own)} follows data.{key}={getattr(data, key)}; set data.{key}"
    longest = sequence_limit(config)
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        yield (
            f"{_ROLLOUT}.max_model_len={rollout.max_model_len} is less than data.max_prompt_length +"
            f" data.max_response_length = {longest}; set it to null or at least {longest}"
        )


def joins_a_cluster(config: PPOConfig) -> bool:
    """Whether Ray runs before this run does."""
    address = config.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS") or None
    return address != "local" and (address is not None or config.trainer.nnodes > 1)


def _ray(config: PPOConfig) -> Problems:
    init, trainer = config.ray_kwargs.ray_init, config.trainer
    yield from _positive(trainer__ray_wait_timeout=trainer.ray_wait_timeout)
    if trainer.nnodes > 1 and init.address == "local":
        yield f"ray_kwargs.ray_init.address=local is one machine, but trainer.nnodes={trainer.nnodes} (docs/nodes.md)"
    if not joins_a_cluster(config):
        return
    sizes = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard", "dashboard_host", "dashboard_port")
    for name in (name for name in (*sizes, "_temp_dir") if getattr(init, name) is not None):
        yield (
            f"ray_kwargs.ray_init.{name}={getattr(init, name)} is for a Ray that this run starts, but it joins a"
            " cluster: leave it out, and give it to `ray start` there"
        )


def _placement(config: PPOConfig) -> Problems:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    if config.actor_rollout_ref.hybrid_engine:
        return
    key = "actor_rollout_ref.hybrid_engine=False"
    if trainer.device == "cpu":
        yield f"{key} puts actor and rollout on GPUs of their own, and trainer.device=cpu has none; set it to True"
    for name, value in (("nnodes", rollout.nnodes), ("n_gpus_per_node", rollout.n_gpus_per_node)):
        if value < 1:
            yield f"{_ROLLOUT}.{name}={value} must be at least 1: {key} gives the rollout GPUs of its own"
    tp = rollout.tensor_model_parallel_size
    if rollout.name == "vllm" and tp > 0 and rollout.n_gpus_per_node % tp:
        gpus = f"{_ROLLOUT}.n_gpus_per_node={rollout.n_gpus_per_node}"
        yield f"{_ROLLOUT}.tensor_model_parallel_size={tp} does not divide {gpus}"


def _pixels(smallest: int | None, largest: int | None) -> Problems:
    yield from _positive(data__min_pixels=smallest, data__max_pixels=largest)
    if smallest is not None and largest is not None and smallest > largest:
        yield f"data.min_pixels={smallest} is more than data.max_pixels={largest}"


def _paths(config: PPOConfig) -> Problems:
    data, custom = config.data, config.custom_reward_function
    yield from _files(train=data.train_files, val=data.val_files, test=data.test_files or ())
    yield from no_input("actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)
    yield from no_output("trainer.rollout_data_dir", config.trainer.rollout_data_dir)
    yield from _outputs(config)
    if data.test_files and config.trainer.keep_best and _same_file(data.val_files, data.test_files):
        yield (
            "data.test_files and data.val_files share a file: the test split would choose the checkpoint it is reported"
            " on; validate on other rows, or set trainer.keep_best=False"
        )
    if custom.path is not None and not custom.name:
        yield "custom_reward_function.name is empty; name the function in custom_reward_function.path"


def _files(**splits: Sequence[str]) -> Problems:
    for split, paths in splits.items():
        if not paths and split != "test":
            yield f"data.{split}_files is empty; give a parquet file"
        for path in paths:
            yield from no_input(f"data.{split}_files", path)


def _adapters(config: PPOConfig) -> Problems:
    yield from _lora("actor_rollout_ref.model", config.actor_rollout_ref.model)


def _lora(node: str, model: ModelConfig | SFTModelConfig) -> Problems:
    if model.lora_rank < 0:
        yield f"{node}.lora_rank={model.lora_rank} must be 0 (no adapters) or at least 1"
    if model.lora_alpha <= 0:
        yield f"{node}.lora_alpha={model.lora_alpha} must be greater than 0"
    yield from no_input(f"{node}.lora_adapter_path", model.lora_adapter_path)
    if not model.target_modules:
        yield f"{node}.target_modules is empty; name layers, or all-linear"


def _outputs(config: PPOConfig | SFTConfig) -> Problems:
    trainer = config.trainer
    yield from no_output("trainer.default_local_dir", trainer.default_local_dir)
    yield from no_output("trainer.validation_data_dir", trainer.validation_data_dir)
    yield from no_output("data.image_cache_dir", config.data.image_cache_dir)


def _same_file(one: Sequence[str], other: Sequence[str]) -> bool:
    return bool({Path(p).resolve() for p in one} & {Path(p).resolve() for p in other})


def _sampling(config: PPOConfig) -> Problems:
    rollout = config.actor_rollout_ref.rollout
    yield from _draw(_ROLLOUT, rollout)
    yield from _draw(f"{_ROLLOUT}.val_kwargs", rollout.val_kwargs)
    yield from _between(f"{_ROLLOUT}.gpu_memory_utilization", rollout.gpu_memory_utilization, 0.01, 1)
    yield from engine_kwargs_problems(_ROLLOUT, rollout)
    yield from _scoring(config.reward)
    yield from _judge(config)


def _judge(config: PPOConfig) -> Problems:
    judge, custom = config.reward.judge, config.custom_reward_function.path
    yield from _positive(reward__num_workers=config.reward.num_workers)
    if not judge.enable:
        return
    if custom is not None:
        yield (
            "reward.judge.enable=True has no effect on custom_reward_function.path: pass the judge's options in "
            "custom_reward_function.reward_kwargs, or set reward.judge.enable=False"
        )
    # On a cluster that was there before, the key is in its environment: the judge's process looks at start.
    here = not joins_a_cluster(config)
    if here and judge.api_key_env is not None and not os.environ.get(judge.api_key_env, "").strip():
        # Somebody may have written the key itself here: only what looks like a name is shown.
        shown = judge.api_key_env if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,40}", judge.api_key_env) else "..."
        yield (
            f"reward.judge.api_key_env={shown}: there is no such environment variable; export the judge's key and give"
            " the variable's name, or set null for a server without keys"
        )


def _draw(node: str, sampling: RolloutConfig | SamplingConfig | SFTRolloutConfig) -> Problems:
    if sampling.temperature < 0:
        yield f"{node}.temperature={sampling.temperature} must not be negative"
    if sampling.top_k < -1 or sampling.top_k == 0:
        yield f"{node}.top_k={sampling.top_k} must be -1 (no limit) or at least 1"
    if not 0 < sampling.top_p <= 1:
        yield f"{node}.top_p={sampling.top_p} must be above 0 and at most 1"


def _scoring(reward: ScoringConfig) -> Problems:
    yield from _positive(reward__timeout=reward.timeout)
    yield from _between("reward.max_failure_rate", reward.max_failure_rate, 0, 1)


def _kl(config: PPOConfig) -> Problems:
    control = config.algorithm.kl_ctrl
    if config.actor_rollout_ref.actor.use_kl_loss and config.algorithm.use_kl_in_reward:
        yield f"{_ACTOR}.use_kl_loss and algorithm.use_kl_in_reward are both True: the KL counts once; set one to False"
    if control.kl_coef < 0:
        yield f"algorithm.kl_ctrl.kl_coef={control.kl_coef} must not be negative"
    if control.type == "adaptive":
        for name in ("horizon", "target_kl"):
            value = getattr(control, name)
            if value is None or value <= 0:
                yield f"algorithm.kl_ctrl.{name}={value}: kl_ctrl.type=adaptive needs a value above 0"


def _trainer(config: PPOConfig) -> Problems:
    trainer = config.trainer
    yield from _positive(
        trainer__total_epochs=trainer.total_epochs,
        trainer__total_training_steps=trainer.total_training_steps,
        trainer__max_actor_ckpt_to_keep=trainer.max_actor_ckpt_to_keep,
    )
    yield from _resume(trainer.resume_mode, trainer.resume_from_path, "trainer.resume_from_path")
    yield from _names(trainer.project_name, trainer.experiment_name, trainer.default_local_dir)
    for key, value in (("critic_warmup", trainer.critic_warmup), ("log_val_generations", trainer.log_val_generations)):
        if value < 0:
            yield f"trainer.{key}={value} must not be negative"


def _names(project: str, experiment: str, folder: str) -> Problems:
    for key, value in (("project_name", project), ("experiment_name", experiment), ("default_local_dir", folder)):
        if not value.strip():
            yield f"trainer.{key} is empty; it names the output folder"


def _resume(mode: str, path: str | None, path_key: str) -> Problems:
    if mode == "resume_path":
        if path is None:
            yield f"trainer.resume_mode=resume_path needs {path_key}=.../global_step_N"
        elif not _STEP_FOLDER.search(path):
            yield f"{path_key}={path} must end in global_step_N"
    elif mode not in ("auto", "disable") and not _STEP_FOLDER.search(mode):
        yield f"trainer.resume_mode={mode}: expected auto, disable, resume_path, or a path ending in global_step_N"


def _batches(config: PPOConfig) -> Problems:
    batch, actor = config.data.train_batch_size, config.actor_rollout_ref.actor
    mini, ranks = actor.ppo_mini_batch_size, world_size(config)
    key = f"{_ACTOR}.ppo_mini_batch_size"
    if mini < 1:
        yield f"{key}={mini} must be at least 1"
    elif mini > batch:
        yield f"{key}={mini} is more than data.train_batch_size={batch}; both count prompts: lower {key}"
    elif batch % mini:
        yield f"data.train_batch_size={batch} does not divide by {key}={mini}; {batch % mini} prompts would be left"
    if 0 < mini < ranks:
        yield f"{key}={mini} is less than one prompt for each of {ranks} ranks (trainer.nnodes x n_gpus_per_node)"
    yield from _fsdp(f"{_ACTOR}.fsdp_config", actor.fsdp_config, ranks)
    yield from _positive(actor_rollout_ref__actor__ppo_epochs=actor.ppo_epochs)


def _fsdp(node: str, fsdp: FSDPConfig, ranks: int) -> Problems:
    size = fsdp.fsdp_size
    if size != -1 and (size < 1 or ranks % size):
        yield f"{node}.fsdp_size={size} must be -1 or divide the {ranks} ranks"
    buffers = fsdp.mixed_precision.buffer_dtype
    if buffers != "fp32":
        yield (
            f"{node}.mixed_precision.buffer_dtype={buffers} must be fp32: the buffers are rotary frequencies, and half"
            " precision does not tell neighbouring positions of a long sequence apart"
        )


def _micro_batches(config: PPOConfig) -> Problems:
    if world_size(config) < 1:
        return
    budgets: list[Callable[[], int]] = [lambda: update_tokens(config), lambda: log_prob_tokens(config, reference=False)]
    if uses_reference(config):
        budgets.append(lambda: log_prob_tokens(config, reference=True))
    for budget in budgets:
        try:
            budget()
        except ValueError as error:
            yield str(error)


def _training_sampling(config: PPOConfig) -> Problems:
    rollout = config.actor_rollout_ref.rollout
    estimator = config.algorithm.adv_estimator
    if rollout.n == 1 and estimator != "reinforce_plus_plus":
        yield f"{_ROLLOUT}.n=1: {estimator} compares the answers of a prompt; set {_ROLLOUT}.n to at least 2"
    if not rollout.do_sample or rollout.temperature == 0:
        yield f"{_ROLLOUT}: greedy answers are all the same; set do_sample=True and temperature above 0"
    correction = config.algorithm.rollout_correction
    if (rollout.top_k > 0 or 0 < rollout.top_p < 1) and correction.rollout_is is None and not correction.bypass_mode:
        yield (
            f"{_ROLLOUT}.top_k={rollout.top_k}, top_p={rollout.top_p}: training on a cut distribution needs a"
            f" correction; set {_CORRECTION}.rollout_is=token, or top_k=-1 and top_p=1"
        )


def _correction(config: PPOConfig) -> Problems:
    correction = config.algorithm.rollout_correction
    if correction.rollout_is_threshold <= 0:
        yield f"{_CORRECTION}.rollout_is_threshold={correction.rollout_is_threshold} must be greater than 0"
    threshold = correction.rollout_rs_threshold
    if correction.rollout_rs is not None and (threshold is None or threshold <= 1):
        yield f"{_CORRECTION}.rollout_rs={correction.rollout_rs} needs rollout_rs_threshold above 1, got {threshold}"
    if correction.rollout_is_batch_normalize and correction.rollout_is is None:
        yield f"{_CORRECTION}.rollout_is_batch_normalize=True needs rollout_is: without it there is nothing to scale"
    if correction.bypass_mode and correction.rollout_rs is not None:
        yield f"{_CORRECTION}.rollout_rs={correction.rollout_rs} needs the policy's log-probs; set bypass_mode=False"
    if correction.bypass_mode and correction.rollout_is_batch_normalize:
        yield f"{_CORRECTION}.rollout_is_batch_normalize needs the policy's log-probs; set bypass_mode=False"
    if correction.bypass_mode and config.algorithm.use_kl_in_reward:
        yield f"{_CORRECTION}.bypass_mode=True makes no log-probs of the policy; set algorithm.use_kl_in_reward=False"
    if correction.loss_type == "reinforce" and not correction.bypass_mode:
        yield f"{_CORRECTION}.loss_type=reinforce needs bypass_mode=True"


def _losses(config: PPOConfig) -> Problems:
    actor = config.actor_rollout_ref.actor
    low, high = clip_range(actor)
    if config.algorithm.adv_estimator == "reinforce_plus_plus" and config.algorithm.gamma != 1.0:
        yield f"algorithm.gamma={config.algorithm.gamma}: rewards are not discounted over tokens; set algorithm.gamma=1"
    yield from _between(f"{_ACTOR}.clip_ratio{'' if actor.clip_ratio_low is None else '_low'}", low, 0, 1)
    if high < 0:
        yield f"{_ACTOR}.clip_ratio_high={high} must not be negative"
    if actor.clip_ratio_c <= 1:
        yield f"{_ACTOR}.clip_ratio_c={actor.clip_ratio_c} must be above 1"
    if actor.kl_loss_coef < 0:
        yield f"{_ACTOR}.kl_loss_coef={actor.kl_loss_coef} must not be negative"
    yield from _positive(
        actor_rollout_ref__actor__grad_clip=actor.grad_clip,
        actor_rollout_ref__actor__loss_scale_factor=actor.loss_scale_factor,
    )


def _optim(config: PPOConfig) -> Problems:
    optim, node = config.actor_rollout_ref.actor.optim, f"{_ACTOR}.optim"
    yield from _adamw(node, optim.lr, optim.betas, optim.weight_decay)
    yield from _between(f"{node}.lr_warmup_steps_ratio", optim.lr_warmup_steps_ratio, 0, 1)
    yield from _between(f"{node}.min_lr_ratio", optim.min_lr_ratio, 0, 1)
    yield from _positive(actor_rollout_ref__actor__optim__num_cycles=optim.num_cycles)
    if optim.total_training_steps == 0:
        yield f"{node}.total_training_steps=0: expected -1 (the trainer computes it) or at least 1"


def _adamw(node: str, lr: float, betas: tuple[float, float], weight_decay: float) -> Problems:
    if lr < 0:
        yield f"{node}.lr={lr} must not be negative"
    if not all(0 <= beta < 1 for beta in betas):
        yield f"{node}.betas={list(betas)} must each be at least 0 and less than 1"
    if weight_decay < 0:
        yield f"{node}.weight_decay={weight_decay} must not be negative"


def _sft_data(config: SFTConfig) -> Problems:
    data, ranks = config.data, world_size(config)
    yield from _positive(
        data__train_batch_size=data.train_batch_size,
        data__micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        data__val_batch_size=data.val_batch_size,
        data__max_length=data.max_length,
        data__max_prompt_length=data.max_prompt_length,
        data__max_response_length=data.max_response_length,
        trainer__nnodes=config.trainer.nnodes,
        trainer__n_gpus_per_node=config.trainer.n_gpus_per_node,
        rollout__n=config.rollout.n,
        rollout__hf_batch_size=config.rollout.hf_batch_size,
    )
    yield from _pixels(data.min_pixels, data.max_pixels)
    yield from _files(train=data.train_files, val=data.val_files)
    yield from _lora("model", config.model)
    yield from no_input("model.partial_pretrain", config.model.partial_pretrain)
    yield from _outputs(config)
    if 0 < data.train_batch_size < ranks:
        yield f"data.train_batch_size={data.train_batch_size} is less than one row for each of {ranks} ranks"
    if data.max_length < data.max_prompt_length:
        yield f"data.max_length={data.max_length} is less than data.max_prompt_length={data.max_prompt_length}"
    yield from _fsdp("model.fsdp_config", config.model.fsdp_config, ranks)
    for name in ("param_offload", "optimizer_offload", "reshard_after_forward"):
        if getattr(config.model.fsdp_config, name) == "auto":
            yield f"model.fsdp_config.{name}=auto is for RL, whose memory is planned; set it to True or False"
    yield from _draw("rollout", config.rollout)
    yield from _scoring(config.reward)


def _sft_optim(config: SFTConfig) -> Problems:
    optim = config.optim
    yield from _adamw("optim", optim.lr, optim.betas, optim.weight_decay)
    yield from _between("optim.warmup_steps_ratio", optim.warmup_steps_ratio, 0, 1)
    yield from _between("optim.min_lr_ratio", optim.min_lr_ratio, 0, 1)
    yield from _positive(optim__clip_grad=optim.clip_grad)


def _sft_trainer(config: SFTConfig) -> Problems:
    trainer = config.trainer
    yield from _positive(
        trainer__total_epochs=trainer.total_epochs,
        trainer__total_training_steps=trainer.total_training_steps,
        trainer__max_seconds=trainer.max_seconds,
        trainer__max_actor_ckpt_to_keep=trainer.max_actor_ckpt_to_keep,
    )
    yield from _resume(sft_resume_mode(config), trainer.resume_path, "trainer.resume_path")
    yield from _names(trainer.project_name, trainer.experiment_name, trainer.default_local_dir)
    if trainer.log_val_generations < 0:
        yield f"trainer.log_val_generations={trainer.log_val_generations} must not be negative"
    if trainer.stop_parse_failure is not None:
        yield from _between("trainer.stop_parse_failure", trainer.stop_parse_failure, 0, 1)
        if isinstance(trainer.test_freq, int) and trainer.test_freq <= 0:
            yield "trainer.stop_parse_failure looks at validations; set trainer.test_freq=after_each_epoch"
