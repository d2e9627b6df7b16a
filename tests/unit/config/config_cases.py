"""The overrides of the original `run_ctu.sh`, and a short way to run them."""

from __future__ import annotations

from functools import cache

from verl.config.loader import Resolved, resolve

_SCRIPT = """
algorithm.adv_estimator=grpo
data.train_files=./data/ctu_image/train.parquet
data.val_files=./data/ctu_image/test.parquet
data.train_batch_size=64
data.max_prompt_length=1024
data.max_response_length=1024
data.filter_overlong_prompts=True
data.truncation='error'
data.image_key=images
actor_rollout_ref.model.path=checkpoints/TimeMaster-SFT-Qwen2.5-VL-3B-CTU
actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.model.use_remove_padding=True
actor_rollout_ref.actor.ppo_mini_batch_size=32
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
actor_rollout_ref.actor.use_kl_loss=True
actor_rollout_ref.actor.kl_loss_coef=0.01
actor_rollout_ref.actor.kl_loss_type=low_var_kl
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.fsdp_config.param_offload=False
actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
actor_rollout_ref.rollout.tensor_model_parallel_size=2
actor_rollout_ref.rollout.name=vllm
actor_rollout_ref.rollout.gpu_memory_utilization=0.6
actor_rollout_ref.rollout.enable_chunked_prefill=False
actor_rollout_ref.rollout.enforce_eager=False
actor_rollout_ref.rollout.free_cache_engine=False
actor_rollout_ref.rollout.val_kwargs.temperature=0.4
actor_rollout_ref.rollout.val_kwargs.do_sample=True
actor_rollout_ref.rollout.n=5
actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8
actor_rollout_ref.ref.fsdp_config.param_offload=True
algorithm.kl_ctrl.kl_coef=0.001
trainer.critic_warmup=0
trainer.logger=['console','wandb']
trainer.project_name='TimeMaster_CTU'
trainer.experiment_name='qwen2.5_vl_3b_grpo_sft_rl'
trainer.n_gpus_per_node=4
trainer.nnodes=1
trainer.save_freq=100
trainer.test_freq=5
trainer.val_only=False
trainer.val_before_train=True
trainer.total_epochs=100
"""
RUN_CTU = _SCRIPT.split()

SMALL = [
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "trainer.n_gpus_per_node=1",
]
"""The least that makes the defaults run."""


@cache
def ppo(*overrides: str) -> Resolved:
    """`run_ctu.sh` with further overrides at the end, as a user adds them."""
    return resolve("ppo_trainer", [*RUN_CTU, *overrides])


@cache
def small(*overrides: str) -> Resolved:
    return resolve("ppo_trainer", [*SMALL, *overrides])


@cache
def sft(*overrides: str) -> Resolved:
    return resolve("sft_trainer", list(overrides))
