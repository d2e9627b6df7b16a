"""`sft_trainer.yaml` as frozen dataclasses.

No field has a default: the yaml holds every value. The text under a field is its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from verl.config.nodes import CustomRewardConfig, Device, FSDPConfig, RolloutDtype, ScoringConfig
from verl.config.ppo import LoggerName, Truncation

Frequency = int | Literal["after_each_epoch"]
"""Every k steps, at the end of each epoch, or never (<= 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTDataConfig:
    """Parquet files and how rows become examples."""

    train_files: tuple[str, ...]
    """One path or a list of paths."""
    val_files: tuple[str, ...]
    """Rows for validation."""
    test_files: tuple[str, ...] | None
    """Rows scored once, at the end of training, without answers to learn; null: none."""
    prompt_key: str
    """Column with the prompt: chat messages or text."""
    response_key: str
    """Column with the answer to learn."""
    image_key: str
    """Column with the images; a row without it is text only."""
    train_batch_size: int
    """Rows per optimizer step."""
    micro_batch_size_per_gpu: int
    """Rows per forward on a GPU, read as a budget of k x max_length tokens."""
    val_batch_size: int | None
    """Rows per validation chunk; null: all at once."""
    max_length: int
    """Tokens of prompt + answer in training, counted after image expansion."""
    max_prompt_length: int
    """Tokens of the prompt alone."""
    max_response_length: int
    """Tokens an answer may have in validation."""
    filter_overlong_prompts: bool
    """Drop longer rows when the data is loaded, and say how many."""
    truncation: Truncation
    """What happens to a longer row that was not dropped; never a cut inside an image."""
    shuffle: bool
    """A new order of the rows every epoch."""
    seed: int
    """Seed of that order."""
    image_cache_dir: str | None
    """Folder of resized images; null: one in the user's cache."""
    min_pixels: int | None
    """Smallest image area; null: the model's preprocessor decides."""
    max_pixels: int | None
    """Largest image area; null: the model's preprocessor decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTModelConfig:
    """The model to start from."""

    partial_pretrain: str
    """A local folder or a hub id."""
    external_lib: str | None
    """A python module imported before the model is built."""
    trust_remote_code: bool
    """Run python code that comes with the tokenizer."""
    override_config: Mapping[str, Any]
    """Fields of the model's config.json to replace."""
    enable_gradient_checkpointing: bool
    """Recompute activations in the backward pass."""
    lora_rank: int
    """Rank of the adapters (LoRA) that are trained in place of the weights; 0: none."""
    lora_alpha: float
    """Adapters count alpha / rank times."""
    target_modules: tuple[str, ...]
    """Layers with an adapter: all-linear (the vision tower's too, never the head), ends of names, or regexes."""
    exclude_modules: tuple[str, ...] | None
    """Layers without one, though target_modules names them; .*visual.* leaves out the vision tower."""
    lora_adapter_path: str | None
    """Start from this folder of peft; it decides rank, alpha and layers; its base is partial_pretrain."""
    use_liger: bool
    """Liger's Triton kernels for norms and gated activations; needs CUDA and the package liger-kernel."""
    freeze_vision_tower: bool
    """Leave the vision tower's weights as they are."""
    freeze: tuple[str, ...]
    """Shell patterns of parameter names that are not trained, e.g. *.layers.0.*; a table at start shows what is."""
    fsdp_config: FSDPConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTOptimConfig:
    """AdamW and its schedule."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float]
    """Decay of AdamW's two averages."""
    weight_decay: float
    """Decoupled weight decay."""
    warmup_steps_ratio: float
    """Warm-up as a share of all optimizer steps."""
    lr_scheduler: Literal["constant", "cosine"]
    """Schedule after the warm-up."""
    min_lr_ratio: float
    """Where cosine ends, as a share of `lr`."""
    clip_grad: float
    """Largest global gradient norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRolloutConfig:
    """How validation answers are written."""

    name: Literal["hf"]
    """The hf engine writes validation answers."""
    n: int
    """Answers per prompt."""
    temperature: float
    """0 is greedy."""
    top_k: int
    """-1: no limit."""
    top_p: float
    """1: no limit."""
    do_sample: bool
    """False is greedy."""
    seed: int
    """Seed of the sampling noise."""
    dtype: RolloutDtype
    """Type of the engine's weights."""
    hf_batch_size: int
    """hf: sequences decoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTTrainerConfig:
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
    seed: int
    """Seed of the run; data.seed and rollout.seed follow it, and the global generators start from it each step."""
    total_epochs: int
    """Passes over the training rows."""
    total_training_steps: int | None
    """Number of steps; null: total_epochs x steps per epoch."""
    max_seconds: float | None
    """Stop at the first step after this time; null: no limit."""
    stop_parse_failure: float | None
    """Stop at the first validation whose share of unparsable answers is below this; null: never."""
    val_before_train: bool
    """A validation before the first step."""
    test_freq: Frequency
    """Validate every k steps or after_each_epoch; <= 0: at the last step only."""
    save_freq: Frequency
    """Save every k steps or after_each_epoch; <= 0: at the last step only."""
    max_actor_ckpt_to_keep: int | None
    """Older checkpoints are deleted once a new one is whole; null: keep all."""
    resume_mode: str
    """auto (resume_path where it is set, else the newest checkpoint of this run), disable, resume_path, or a path."""
    resume_path: str | None
    """The folder to go on from; it ends in global_step_N."""
    log_val_generations: int
    """Validation answers sent to the trackers each time."""
    validation_data_dir: str | None
    """Folder for all validation answers; null: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """Root of sft_trainer.yaml."""

    data: SFTDataConfig
    model: SFTModelConfig
    optim: SFTOptimConfig
    rollout: SFTRolloutConfig
    custom_reward_function: CustomRewardConfig
    reward: ScoringConfig
    trainer: SFTTrainerConfig
