#!/usr/bin/env bash
# What the GRPO scripts of all tasks share; sourced by run_*.sh, which set MODEL_PATH, EVAL, PAPER, MODALITY, DATA, `task`.
# Some also set `_published` (a folder to start from when it is there), `_task_name`, and a function `complete_task`, called
# with the overrides once the model is known.
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
    train_file=$DATA/train.parquet
    files=(data.train_files="$train_file" data.val_files="$DATA/test.parquet" trainer.keep_best=False)
else
    train_file=$DATA/fit.parquet
    files=(data.train_files="$train_file" data.val_files="$DATA/val.parquet" data.test_files="$DATA/test.parquet")
fi
# The SFT scripts' rule, so that reports before and after GRPO compare; the published protocol has its own.
answer_format=strict
[[ $PAPER == False ]] || answer_format=loose
if [[ -z $MODEL_PATH && -n ${_published:-} && -d $_published ]]; then
    MODEL_PATH=$_published
elif [[ $EVAL == True && -z $MODEL_PATH ]]; then
    echo "error: EVAL=True scores the weights of MODEL_PATH: name a folder, e.g. .../global_step_N/actor/huggingface" >&2
    exit 2
elif [[ -z $MODEL_PATH ]]; then
    script=$(basename "$0" .sh)
    script=${script#run_}
    _task_name=${_task_name:-$script}
    sft="checkpoints/TimeMaster_${_task_name^^}/sft_$MODALITY"
    if [[ ! -f $sft/latest_checkpointed_iteration.txt ]]; then
        echo "error: no checkpoint in $sft${_published:+ and no $_published}: run example/sft/run_${script}_sft.sh" \
            "first, or set MODEL_PATH" >&2
        exit 2
    fi
    MODEL_PATH=$sft/global_step_$(<"$sft/latest_checkpointed_iteration.txt")/actor/huggingface
fi
echo "$(basename "$0"): weights of $MODEL_PATH"
if declare -F complete_task >/dev/null; then
    complete_task "$@"
fi

# 64 prompts a step, as published, or as many as there are; two updates.
batch=64
if [[ -f $train_file ]]; then
    rows=$(python3 -c 'import sys, pyarrow.parquet as p; print(p.read_metadata(sys.argv[1]).num_rows)' "$train_file")
    ((rows >= 64)) || batch=$((rows > 1 ? rows - rows % 2 : 1))
    echo "$(basename "$0"): $train_file has $rows rows"
fi
# Every rank needs a prompt of each update: few rows on many GPUs make one update.
mini_batch=$((batch / 2 < N_GPUS ? batch : batch / 2))
echo "$(basename "$0"): $batch prompts a step, $mini_batch an update, unless overridden"
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
    data.train_batch_size="$batch" \
    data.max_prompt_length="$prompt_length" \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    data.image_key=images \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size="$mini_batch" \
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
    reward.format="$answer_format" \
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
