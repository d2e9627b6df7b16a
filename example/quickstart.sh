#!/usr/bin/env bash
# The whole job on a machine without a GPU: plots of a data set bundled with sktime, a tiny Qwen2.5-VL made here,
# a supervised start, GRPO, and the test split scored once. Installs into .venv first. Settings from the environment:
#   SEED=1          seed of model, data order and sampling
#   RESPLIT=        empty: the archive's own split; a number: a stratified re-split with that seed
#   RL_STEPS=60     GRPO steps
#   RUN_DIR=        where models and reports go (default checkpoints/quickstart)
#   CONTROLS=True   afterwards also: SFT for as long as GRPO took, and GRPO with its rewards dealt out at random
# Further arguments are overrides of the GRPO run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
begin=$SECONDS
source scripts/setup_venv.sh run

seed=${SEED:-1}
resplit=${RESPLIT:-}
run=${RUN_DIR:-checkpoints/quickstart}
data=data/basic_motions_image${resplit:+_resplit$resplit}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
# Validation and test answers of both stages are drawn alike.
sampling=(temperature=0.4 do_sample=True)

run_sft() { # folder, overrides
    python -m verl.trainer.sft_trainer \
        data.train_files="$data/sft_fit.parquet" data.val_files="$data/sft_val.parquet" \
        data.test_files="$data/test.parquet" \
        data.train_batch_size=8 data.micro_batch_size_per_gpu=8 \
        data.max_length=256 data.max_prompt_length=192 data.max_response_length=48 \
        optim.lr=1e-3 optim.lr_scheduler=constant optim.warmup_steps_ratio=0.05 \
        "${sampling[@]/#/rollout.}" rollout.n=4 rollout.hf_batch_size=256 reward.format=strict \
        trainer.save_freq=-1 trainer.resume_mode=disable trainer.seed="$seed" trainer.default_local_dir="$1" "${@:2}"
}

run_rl() { # folder, overrides
    python -m verl.trainer.main_ppo \
        data.train_files="$data/fit.parquet" data.val_files="$data/val.parquet" data.test_files="$data/test.parquet" \
        data.train_batch_size=32 data.max_prompt_length=192 data.max_response_length=48 \
        actor_rollout_ref.model.path="$sft" \
        actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64 \
        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.optim.lr=3e-4 \
        "actor_rollout_ref.actor.optim.betas=[0.9,0.95]" actor_rollout_ref.actor.optim.lr_warmup_steps=5 \
        actor_rollout_ref.actor.optim.warmup_style=cosine actor_rollout_ref.actor.optim.min_lr_ratio=0.05 \
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.3 \
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64 \
        actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.hf_batch_size=256 \
        actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.temperature=0.7 \
        actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64 \
        "${sampling[@]/#/actor_rollout_ref.rollout.val_kwargs.}" actor_rollout_ref.rollout.val_kwargs.n=4 \
        reward.format=strict trainer.n_gpus_per_node=1 trainer.total_training_steps="${RL_STEPS:-60}" \
        trainer.test_freq=20 trainer.save_freq=1000 trainer.keep_best=False trainer.logger="['console']" \
        trainer.resume_mode=disable trainer.seed="$seed" trainer.default_local_dir="$1" "${@:2}"
}

echo "== 1/4 data: time series to plots"
python -m verl.timeseries.build task=basic_motions "output=$data" "resplit_seed=${resplit:-null}"

echo "== 2/4 model: a tiny Qwen2.5-VL with random weights"
python -m verl.models.tiny --output "$run/tiny" --texts "$data/sft_fit.parquet" --seed "$seed"

echo "== 3/4 SFT until fewer than 2 % of validation answers are malformed"
run_sft "$run/sft" model.partial_pretrain="$run/tiny" trainer.total_epochs=80 trainer.stop_parse_failure=0.02 \
    trainer.max_actor_ckpt_to_keep=1
sft=$run/sft/global_step_$(<"$run/sft/latest_checkpointed_iteration.txt")/actor/huggingface

echo "== 4/4 GRPO: the reward is 0.9 for the right class and 0.1 for the format"
run_rl "$run/rl" "$@"
seconds=$((SECONDS - begin))

controls=()
if [[ ${CONTROLS:-} == True ]]; then
    echo "== control: SFT for as long as GRPO took"
    long=$(python example/quickstart_summary.py --rl-seconds "$run/rl")
    run_sft "$run/sft_long" model.partial_pretrain="$sft" trainer.total_epochs=100000 trainer.max_seconds="$long" \
        trainer.test_freq=-1 optim.warmup_steps_ratio=0
    echo "== control: GRPO with rewards permuted over the batch"
    run_rl "$run/rl_shuffled" reward.shuffle=True "$@"
    controls=(--sft-long "$run/sft_long" --rl-shuffled "$run/rl_shuffled")
fi
python example/quickstart_summary.py --data BasicMotions --sft "$run/sft" --rl "$run/rl" --seconds "$seconds" \
    "${controls[@]}"
