#!/usr/bin/env bash
# What the GRPO scripts of all tasks share; sourced by run_*.sh, which set MODEL_PATH, EVAL, PAPER, MODALITY, DATA, `task`.
# shellcheck disable=SC2154 # `task` is set by the script that sources this one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
flag EVAL
flag PAPER

gpus=$(visible_gpus)
if [[ $gpus -eq 0 ]]; then
    N_GPUS=${N_GPUS:-2}
    ENGINE=${ENGINE:-hf}
    echo "$(basename "$0"): no GPU here: $ENGINE engine on CPU, $N_GPUS processes"
else
    N_GPUS=${N_GPUS:-$gpus}
    ENGINE=${ENGINE:-vllm}
    echo "$(basename "$0"): $ENGINE engine on $N_GPUS of $gpus GPUs"
fi

if [[ $EVAL == True || $PAPER == True ]]; then
    files=(data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" trainer.keep_best=False)
else
    files=(data.train_files="$DATA/fit.parquet" data.val_files="$DATA/val.parquet" data.test_files="$DATA/test.parquet")
fi
if [[ $EVAL == True && -z $MODEL_PATH ]]; then
    echo "error: EVAL=True scores the weights of MODEL_PATH: name a folder, e.g. .../global_step_N/actor/huggingface" >&2
    exit 2
elif [[ -z $MODEL_PATH ]]; then
    script=$(basename "$0" .sh)
    script=${script#run_}
    task_name=${NAME:-$script}
    sft="checkpoints/TimeMaster_${task_name^^}/sft_$MODALITY"
    if [[ ! -f $sft/latest_checkpointed_iteration.txt ]]; then
        echo "error: no checkpoint in $sft: run example/sft/run_${script}_sft.sh first, or set MODEL_PATH" >&2
        exit 2
    fi
    MODEL_PATH=$sft/global_step_$(<"$sft/latest_checkpointed_iteration.txt")/actor/huggingface
fi
# The prompt counts after image expansion; digits need more room than a plot.
prompt_length=1024
experiment=""
if [[ $MODALITY != image ]]; then
    prompt_length=${NUMERIC_PROMPT_LENGTH:-5120}
    experiment=_$MODALITY
fi
# Options of the vLLM engine; the hf engine does not use them.
engine=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size="${TP:-1}"
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    actor_rollout_ref.rollout.enable_chunked_prefill=False
    actor_rollout_ref.rollout.enforce_eager=False
    actor_rollout_ref.rollout.free_cache_engine=False
)
[[ $ENGINE == vllm ]] || engine=(actor_rollout_ref.rollout.name=hf)

exec python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    "${files[@]}" \
    data.train_batch_size=64 \
    data.max_prompt_length="$prompt_length" \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    data.image_key=images \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.01 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.fsdp_config.param_offload=False \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    "${engine[@]}" \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.4 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    trainer.critic_warmup=0 \
    trainer.logger="['console','wandb']" \
    trainer.experiment_name="qwen2.5_vl_3b_grpo_sft_rl$experiment" \
    trainer.n_gpus_per_node="$N_GPUS" \
    trainer.nnodes=1 \
    trainer.save_freq=100 \
    trainer.test_freq=5 \
    trainer.val_only="$EVAL" \
    trainer.val_before_train=True \
    trainer.total_epochs=100 \
    "${task[@]}" "$@"
