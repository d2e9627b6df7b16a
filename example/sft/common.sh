#!/usr/bin/env bash
# What the SFT scripts of all tasks share; sourced by run_*_sft.sh, which set MODEL_PATH, MODALITY, DATA and `task`.
# shellcheck disable=SC2154 # `task` is set by the script that sources this one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

gpus=$(visible_gpus)
N_GPUS=${N_GPUS:-$((gpus > 0 ? gpus : 1))}
launch=(python3)
((N_GPUS == 1)) || launch=(python3 -m torch.distributed.run --standalone --nproc_per_node "$N_GPUS")

# The prompt counts after image expansion; digits need more room than a plot.
prompt_length=1024
[[ $MODALITY == image ]] || prompt_length=${NUMERIC_PROMPT_LENGTH:-5120}

# GRPO starts from the last checkpoint. No other stays: with the optimizer's state one of 3B parameters is about 50 GB.
exec "${launch[@]}" -m verl.trainer.sft_trainer \
    data.train_files="$DATA/sft_fit.parquet" \
    data.val_files="$DATA/sft_val.parquet" \
    data.test_files="$DATA/test.parquet" \
    data.train_batch_size=32 \
    data.micro_batch_size_per_gpu=4 \
    data.max_prompt_length="$prompt_length" \
    data.max_response_length=1024 \
    data.max_length=$((prompt_length + 1024)) \
    model.partial_pretrain="$MODEL_PATH" \
    model.enable_gradient_checkpointing=True \
    optim.lr=1e-5 \
    rollout.do_sample=True \
    rollout.temperature=0.4 \
    reward.format=strict \
    trainer.experiment_name="sft_$MODALITY" \
    trainer.total_epochs=4 \
    trainer.max_actor_ckpt_to_keep=1 \
    "${task[@]}" "$@"
