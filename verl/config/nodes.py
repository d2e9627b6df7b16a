"""Config nodes of the model, the actor, the reference and the rollout: one frozen dataclass per yaml node.

No field has a default: the yaml holds every value. The text under a field is its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from verl.config.judge import RewardJudgeConfig

KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
"""Estimators of KL; kl = k1, mse = k2, low_var_kl = k3."""
Precision = Literal["fp32", "bf16", "fp16"]
LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
LossMode = Literal["vanilla", "gspo", "cispo", "geo_mean"]
WarmupStyle = Literal["constant", "cosine"]
RolloutName = Literal["hf", "vllm"]
RolloutDtype = Literal["bfloat16", "float32", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Switch = bool | Literal["auto"]
"""auto: the memory plan decides at the start, and says what and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecisionConfig:
    """FSDP2 mixed precision."""

    param_dtype: Precision
    """Type of the weights while they compute."""
    reduce_dtype: Precision
    """Type of the gradients while they are reduced over ranks."""
    buffer_dtype: Precision
    """Type of buffers such as rotary frequencies; only fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDPConfig:
    """How the trained model is sharded."""

    param_offload: Switch
    """Keep the weights in host memory while the actor does not compute; auto: only where memory demands it."""
    optimizer_offload: Switch
    """Keep the optimizer state in host memory between updates; the numbers do not change. auto as above."""
    reshard_after_forward: Switch
    """Free a block's gathered weights after its forward and gather them again in the backward pass. auto as above."""
    fsdp_size: int
    """Ranks that share one copy of the model; -1: all of them. Must divide the number of ranks."""
    model_dtype: Precision
    """Type in which the master weights are held."""
    use_torch_compile: bool
    """Compile chains of pointwise operations (activations, rotation, log-probs), of the reference too; CUDA only."""
    mixed_precision: MixedPrecisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RefFSDPConfig:
    """How the frozen reference is sharded."""

    param_offload: Switch
    """Keep the reference in host memory while it does not compute; auto: only where memory demands it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy's model; tokenizer and image processor come from the same place."""

    path: str
    """A local folder or a hub id."""
    external_lib: str | None
    """A python module imported before the model is built."""
    trust_remote_code: bool
    """Run python code that comes with the tokenizer."""
    override_config: Mapping[str, Any]
    """Fields of the model's config.json to replace."""
    enable_gradient_checkpointing: Switch
    """Recompute activations in the backward pass; auto: only where memory demands it."""
    lora_rank: int
    """Rank of the adapters (LoRA) that are trained in place of the weights; 0: none."""
    lora_alpha: float
    """Adapters count alpha / rank times."""
    target_modules: tuple[str, ...]
    """Layers with an adapter: all-linear (the vision tower's too, never the head), ends of names, or regexes."""
    exclude_modules: tuple[str, ...] | None
    """Layers without one, though target_modules names them; .*visual.* leaves out the vision tower."""
    lora_adapter_path: str | None
    """Start from this folder of peft; it decides rank, alpha and layers. The reference is the base without it."""
    use_liger: bool
    """Liger's Triton kernels for norms and gated activations; needs CUDA and the package liger-kernel."""
    use_remove_padding: bool
    """Packed forward. It is the only path: False changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float
    """Peak learning rate."""
    lr_warmup_steps: int
    """Linear warm-up in optimizer steps; negative: use the ratio."""
    lr_warmup_steps_ratio: float
    """Warm-up as a share of all optimizer steps."""
    warmup_style: WarmupStyle
    """Schedule after the warm-up."""
    min_lr_ratio: float
    """Where cosine ends, as a share of `lr`."""
    num_cycles: float
    """Cosine waves after the warm-up; 0.5 falls once."""
    total_training_steps: int
    """Length of the schedule in optimizer steps; negative: the trainer computes it."""
    betas: tuple[float, float]
    """Decay of AdamW's two averages."""
    weight_decay: float
    """Decoupled weight decay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossConfig:
    """Which policy loss."""

    loss_mode: LossMode
    """vanilla: PPO's clip; gspo, geo_mean: one ratio per answer; cispo: a clipped ratio without gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """The update: mini-batches, loss terms, optimizer."""

    strategy: Literal["fsdp", "fsdp2"]
    """Both run FSDP2."""
    ppo_mini_batch_size: int
    """Prompts per optimizer step (times rollout.n answers)."""
    ppo_micro_batch_size: int | None
    """Deprecated: samples per forward over all GPUs."""
    ppo_micro_batch_size_per_gpu: int | None
    """Samples per forward on a GPU, read as a budget of k x (max_prompt_length + max_response_length) tokens."""
    use_dynamic_bsz: bool
    """Take the token budget from ppo_max_token_len_per_gpu instead."""
    ppo_max_token_len_per_gpu: int
    """Token budget of a micro-batch when use_dynamic_bsz is set."""
    grad_clip: float
    """Largest global gradient norm."""
    clip_ratio: float
    """PPO clip on both sides."""
    clip_ratio_low: float | None
    """Clip below 1; null: clip_ratio."""
    clip_ratio_high: float | None
    """Clip above 1; null: clip_ratio."""
    clip_ratio_c: float
    """Dual clip: bound of the loss of a negative advantage; above 1."""
    policy_loss: PolicyLossConfig
    loss_agg_mode: LossAggMode
    """How token losses become one number; denominators are global."""
    loss_scale_factor: float | None
    """Divisor of seq-mean-token-sum-norm; null: the response length limit."""
    entropy_coeff: float
    """Weight of the entropy bonus; 0 means none."""
    use_kl_loss: bool
    """Add the KL to the reference as a loss term."""
    kl_loss_coef: float
    """Weight of that term."""
    kl_loss_type: KLKind
    """Its estimator."""
    ppo_epochs: int
    """Passes over each batch."""
    shuffle: bool
    """Draw the mini-batches of a step in random order."""
    data_loader_seed: int | None
    """Seed of that order; null: trainer.seed."""
    freeze_vision_tower: bool
    """Leave the vision tower's weights as they are."""
    freeze: tuple[str, ...]
    """Shell patterns of parameter names that are not trained, e.g. *.layers.0.*; a table at start shows what is."""
    optim: OptimConfig
    fsdp_config: FSDPConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RefConfig:
    """The frozen reference's log-probs; built only when a KL term is on."""

    log_prob_micro_batch_size: int | None
    """Deprecated: samples per forward over all GPUs."""
    log_prob_micro_batch_size_per_gpu: int | None
    """Samples per no-grad forward on a GPU."""
    log_prob_use_dynamic_bsz: bool
    """Token budget from log_prob_max_token_len_per_gpu instead."""
    log_prob_max_token_len_per_gpu: int
    """That budget."""
    fsdp_config: RefFSDPConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How validation answers are drawn."""

    n: int
    """Answers per prompt."""
    temperature: float
    """0 is greedy."""
    top_k: int
    """Draw from the k likeliest tokens; -1: no limit."""
    top_p: float
    """Draw from the smallest set of this probability; 1: no limit."""
    do_sample: bool
    """False is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEngineConfig:
    """How the actor's weights reach the engine."""

    update_weights_bucket_megabytes: int
    """Size of a bucket; each GPU holds two of them."""
    checksum: Literal["never", "validation", "always"]
    """When both ends of a transfer compare checksums: validation is at the start and before each validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKwargsConfig:
    """Arguments of an engine that have no key of their own."""

    vllm: Mapping[str, Any]
    """vllm: further fields of its EngineArgs, as they are; not those with a key here, nor what answers mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The engine that writes the answers."""

    name: RolloutName
    """hf: plain torch, CPU or GPU; vllm."""
    n: int
    """Answers per prompt."""
    temperature: float
    """The policy's distribution is softmax(logits / temperature), in training too."""
    top_k: int
    """Draw from the k likeliest tokens; -1: no limit. In training another value needs algorithm.rollout_correction."""
    top_p: float
    """Draw from the smallest set of this probability; 1: no limit. In training as top_k."""
    do_sample: bool
    """Must be True in training."""
    seed: int
    """Seed of the sampling noise."""
    ignore_eos: bool
    """Write on to the length limit."""
    prompt_length: int
    """Follows data.max_prompt_length."""
    response_length: int
    """Follows data.max_response_length."""
    max_model_len: int | None
    """Longest prompt + response; null: the sum of the two limits."""
    dtype: RolloutDtype
    """Type of the engine's weights."""
    hf_batch_size: int
    """hf: sequences decoded together."""
    tensor_model_parallel_size: int
    """vllm: GPUs of one engine; must divide the GPUs of a node."""
    gpu_memory_utilization: float
    """vllm: share of GPU memory."""
    enforce_eager: bool
    """vllm: no CUDA graphs."""
    enable_chunked_prefill: bool
    """vllm: cut long prompts into chunks."""
    free_cache_engine: bool
    """vllm: release the cache while the actor trains; False is a wish to stay awake if memory allows."""
    load_format: Literal["dummy", "auto"]
    """vllm: dummy starts empty and waits for the sync; auto reads the disk."""
    max_num_seqs: int
    """vllm: sequences decoded together."""
    max_num_batched_tokens: int
    """vllm: tokens of one engine step."""
    disable_log_stats: bool
    """vllm: no statistics lines."""
    cudagraph_capture_sizes: tuple[int, ...] | None
    """vllm: batch sizes with a CUDA graph; null: a handful up to the largest batch of a step."""
    engine_kwargs: EngineKwargsConfig
    nnodes: int
    """hybrid_engine=False: nodes of the rollout engines."""
    n_gpus_per_node: int
    """hybrid_engine=False: their GPUs on each node."""
    log_prob_micro_batch_size: int | None
    """Deprecated: samples per old-log-prob forward over all GPUs."""
    log_prob_micro_batch_size_per_gpu: int | None
    """Samples per old-log-prob forward on a GPU."""
    log_prob_use_dynamic_bsz: bool
    """Token budget from log_prob_max_token_len_per_gpu instead."""
    log_prob_max_token_len_per_gpu: int
    """That budget."""
    checkpoint_engine: CheckpointEngineConfig
    val_kwargs: SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRolloutRefConfig:
    """The workers."""

    hybrid_engine: bool
    """True: actor and rollout share the GPUs. False: the rollout has its own, rollout.nnodes x n_gpus_per_node."""
    model: ModelConfig
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomRewardConfig:
    """A user's own reward function."""

    path: str | None
    """A python file; null: the task's own reward."""
    name: str
    """The function in it."""
    reward_kwargs: Mapping[str, Any]
    """Passed to every call by keyword."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """How an answer is scored."""

    format: Literal["loose", "strict"]
    """loose: the published rule, a legal label in <class>; strict: also <think>, order and a single <class>."""
    timeout: float
    """Seconds after which a score counts as failed."""
    max_failure_rate: float
    """The run stops when a larger share of a step's scores failed, or of those that the judge was asked about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(ScoringConfig):
    """Scoring in training."""

    shuffle: bool
    """Permute the scores over the batch: the control experiment in which rewards teach nothing."""
    num_workers: int | None
    """Processes that score answers while others are still written; null: one per CPU core, at most 8."""
    parts: Mapping[str, Any]
    """Changes to the task's parts, and further ones, by name: kind, weight, when, before, and the kind's options."""
    judge: RewardJudgeConfig
