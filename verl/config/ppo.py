"""`ppo_trainer.yaml` as frozen dataclasses: data, algorithm, rewards, trainer and the root.

No field has a default: the yaml holds every value. The text under a field is its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from verl.config.nodes import ActorRolloutRefConfig, CustomRewardConfig, Device, KLKind, RewardConfig

Truncation = Literal["error", "left", "right", "middle"]
LoggerName = Literal["console", "file", "tensorboard", "wandb", "mlflow", "swanlab", "vemlp_wandb", "tracking"]
ManagerName = Literal["naive", "ts", "batch", "prime", "dapo", "rate_limited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Parquet files and how rows become prompts."""

    train_files: tuple[str, ...]
    """One path or a list of paths."""
    val_files: tuple[str, ...]
    """Rows for validation, and for the choice of the best checkpoint."""
    test_files: tuple[str, ...] | None
    """Rows scored once, at the end of training; null: none."""
    prompt_key: str
    """Column with the chat messages."""
    image_key: str
    """Column with the images; a row without it is text only."""
    reward_fn_key: str
    """Column that names the data source, and with it the reward."""
    train_max_samples: int
    """Only the first so many training rows; <= 0: all."""
    val_max_samples: int
    """Only the first so many validation rows; <= 0: all."""
    train_batch_size: int
    """Prompts per step."""
    val_batch_size: int | None
    """Prompts per validation chunk; null: all at once."""
    max_prompt_length: int
    """Tokens, counted after image expansion."""
    max_response_length: int
    """Tokens of an answer."""
    filter_overlong_prompts: bool
    """Drop longer prompts when the data is loaded, and say how many."""
    truncation: Truncation
    """What happens to a longer prompt that was not dropped; never a cut inside an image."""
    shuffle: bool
    """A new order of the rows every epoch."""
    seed: int
    """Seed of that order."""
    validation_shuffle: bool
    """Validate in a shuffled order: other rows come first in the trackers' samples; scores stay the same."""
    apply_chat_template_kwargs: Mapping[str, Any]
    """Passed to the chat template."""
    dataloader_num_workers: int | None
    """Threads that decode images at load; null: as many as there are cores."""
    image_cache_dir: str | None
    """Folder of resized images; null: one in the user's cache."""
    min_pixels: int | None
    """Smallest image area; null: the model's preprocessor decides."""
    max_pixels: int | None
    """Largest image area; null: the model's preprocessor decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLControlConfig:
    """Coefficient of the KL in the reward."""

    type: Literal["fixed", "adaptive"]
    """adaptive steers the coefficient towards target_kl."""
    kl_coef: float
    """The coefficient, or where it starts."""
    horizon: int | None
    """adaptive: samples over which it reacts."""
    target_kl: float | None
    """adaptive: the KL aimed at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCorrectionConfig:
    """Weights for answers whose sampler is not exactly the policy that is trained."""

    rollout_is: Literal["token", "sequence"] | None
    """Truncated importance weights by token or by answer; null: none."""
    rollout_is_threshold: float
    """Largest importance weight."""
    rollout_is_batch_normalize: bool
    """Scale the weights of a mini-batch to mean 1."""
    rollout_rs: Literal["token", "sequence", "geometric"] | None
    """Reject tokens, or answers by their summed or mean log-ratio; null: none."""
    rollout_rs_threshold: float | None
    """Ratios outside 1 / threshold to threshold are rejected."""
    bypass_mode: bool
    """Take the sampler's log-probs as the old ones: no forward pass for them."""
    loss_type: Literal["ppo_clip", "reinforce"]
    """bypass_mode: clip the ratio to the sampler, or weight the plain policy gradient with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """From rewards to advantages."""

    adv_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"]
    """grpo: reward minus the group's mean, over its spread; rloo: minus the mean of the others; reinforce_plus_plus: in
    units of the whole step."""
    gamma: float
    """Discount; of no effect in grpo."""
    lam: float
    """GAE's lambda; of no effect in grpo."""
    norm_adv_by_std_in_grpo: bool
    """Divide by the group's standard deviation."""
    use_kl_in_reward: bool
    """Subtract the KL to the reference from the reward."""
    kl_penalty: KLKind
    """Estimator of the KL in the reward."""
    kl_ctrl: KLControlConfig
    rollout_correction: RolloutCorrectionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    """Names kept from verl."""

    enable: bool
    """A reward model on GPUs; there is none, so only False."""
    reward_manager: ManagerName
    """All names mean the one manager."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The loop: length, validation, checkpoints, logs."""

    project_name: str
    """First folder of the outputs, and the tracker's project."""
    experiment_name: str
    """Second folder of the outputs, and the tracker's run."""
    default_local_dir: str
    """Where checkpoints, metrics.jsonl and the resolved config go."""
    logger: tuple[LoggerName, ...]
    """Trackers. metrics.jsonl is always written."""
    device: Device
    """auto: cuda where there is one."""
    nnodes: int
    """Machines."""
    n_gpus_per_node: int
    """Ranks per machine; on CPU the number of processes."""
    ray_wait_timeout: float
    """Seconds that the start waits for the nodes and GPUs of the run, saying every 10 s what is missing."""
    balance_batch: bool
    """Spread groups over ranks by cost; False: by count, in order."""
    seed: int
    """Seed of the run; data.seed and rollout.seed follow it."""
    total_epochs: int
    """Passes over the training rows."""
    total_training_steps: int | None
    """Number of steps; null: total_epochs x steps per epoch."""
    critic_warmup: int
    """The actor is updated from this step on."""
    val_only: bool
    """One validation, then exit."""
    val_before_train: bool
    """A validation before the first step."""
    test_freq: int
    """Validate every k steps and at the last step; <= 0: never."""
    save_freq: int
    """Save every k steps and at the last step; <= 0: never."""
    max_actor_ckpt_to_keep: int | None
    """Older checkpoints are deleted once a new one is whole; null: keep all."""
    keep_best: bool
    """Keep the checkpoint with the best validation, whatever its age."""
    best_metric: str | None
    """The metric that decides; null: the mean of validation accuracy over data sources."""
    resume_mode: str
    """auto (newest checkpoint of this run), disable, resume_path, or a path ending in global_step_N."""
    resume_from_path: str | None
    """The global_step_N folder for resume_mode=resume_path."""
    log_val_generations: int
    """Validation answers sent to the trackers each time."""
    rollout_data_dir: str | None
    """Folder for all training answers, one jsonl a step; null: none."""
    validation_data_dir: str | None
    """Folder for all validation answers; null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeEnvConfig:
    """What Ray gives every worker process."""

    env_vars: Mapping[str, Any]
    """Environment variables of all workers, over those of their node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayInitConfig:
    """Arguments of `ray.init`; null leaves one out."""

    address: str | None
    """The cluster to join; null: RAY_ADDRESS, else the cluster of this machine (nnodes > 1) or a Ray of this run."""
    num_cpus: int | None
    """CPU slots of a Ray of this run; null: the cores, at least 4."""
    num_gpus: int | None
    """GPUs of a Ray of this run; null: all."""
    object_store_memory: int | None
    """Bytes of shared memory of a Ray of this run; null: Ray decides."""
    include_dashboard: bool | None
    """Start the dashboard with a Ray of this run; null: no."""
    dashboard_host: str | None
    """Address that the dashboard listens at; null: 127.0.0.1."""
    dashboard_port: int | None
    """Its port; null: 8265."""
    namespace: str | None
    """Namespace of named actors; there are none here."""
    log_to_driver: bool | None
    """Print what workers print; null: yes."""
    _temp_dir: str | None
    """Folder of Ray's sessions and logs, absolute and short; null: Ray's own."""
    runtime_env: RuntimeEnvConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The node of verl's name."""

    ray_init: RayInitConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """Root of ppo_trainer.yaml."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    algorithm: AlgorithmConfig
    custom_reward_function: CustomRewardConfig
    reward: RewardConfig
    reward_model: RewardModelConfig
    trainer: TrainerConfig
    ray_kwargs: RayConfig
