#!/usr/bin/env bash
# GRPO on the CTU plots (make them first: example/data_preprocess/ctu.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from (an SFT checkpoint)
#   EVAL=True        score test.parquet with MODEL_PATH's weights and exit
#   PAPER=True       the published protocol: train on all 250 rows, validate on test, keep no best checkpoint
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 2 CPU processes)
#   ENGINE=hf        rollout engine
#   TP=1             GPUs of one vLLM engine
# Arguments are overrides; they come last and win: run_ctu.sh trainer.total_epochs=1 "data.train_files=['a.parquet']"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODEL_PATH=${MODEL_PATH:-./checkpoints/TimeMaster-SFT-Qwen2.5-VL-3B-CTU}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
DATA=${DATA:-./data/ctu_image}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [[ $gpus -eq 0 ]]; then
    N_GPUS=${N_GPUS:-2}
    echo "run_ctu.sh: no GPU here: hf engine on CPU, $N_GPUS processes"
else
    N_GPUS=${N_GPUS:-$gpus}
fi
python=python3
[[ -n ${VIRTUAL_ENV:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python

if [[ $EVAL == True || $PAPER == True ]]; then
    files=(data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" trainer.keep_best=False)
else
    files=(data.train_files="$DATA/fit.parquet" data.val_files="$DATA/val.parquet" data.test_files="$DATA/test.parquet")
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
[[ ${ENGINE:-hf} == vllm ]] || engine=(actor_rollout_ref.rollout.name=hf)

exec "$python" -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    "${files[@]}" \
    data.train_batch_size=64 \
    data.max_prompt_length=1024 \
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
    trainer.project_name=TimeMaster_CTU \
    trainer.experiment_name=qwen2.5_vl_3b_grpo_sft_rl \
    trainer.n_gpus_per_node="$N_GPUS" \
    trainer.nnodes=1 \
    trainer.save_freq=100 \
    trainer.test_freq=5 \
    trainer.val_only="$EVAL" \
    trainer.val_before_train=True \
    trainer.total_epochs=100 "$@"
