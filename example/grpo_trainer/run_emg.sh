#!/usr/bin/env bash
# GRPO on the EMG data (make it first: example/data_preprocess/emg.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from (an SFT checkpoint)
#   MODALITY=numeric the rows with digits in place of the plot (example/data_preprocess/emg.sh modality=numeric)
#   EVAL=True        score test.parquet with MODEL_PATH's weights and exit
#   PAPER=True       the published protocol: train on all 163 rows, validate on test, keep no best checkpoint
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 2 CPU processes)
#   ENGINE=vllm      rollout engine: vllm or hf (default: vllm on GPUs, hf without)
#   TP=1             GPUs of one vLLM engine
#   JUDGE=True       a judge reads the <extension> (0.5 of the reward); False: class and format alone
#   JUDGE_URL, JUDGE_MODEL   any OpenAI-compatible server; its key is read from OPENAI_API_KEY, or from the variable that
#                    JUDGE_KEY_ENV names (null: the server asks for none)
# Arguments are overrides; they come last and win: run_emg.sh trainer.total_epochs=1 "data.train_files=['a.parquet']"
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-./checkpoints/TimeMaster-SFT-Qwen2.5-VL-3B-EMG}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/emg_$MODALITY}

JUDGE_URL=${JUDGE_URL:-https://api.openai.com/v1}
JUDGE_MODEL=${JUDGE_MODEL:-gpt-4o}

# shellcheck disable=SC2034 # read by common.sh
task=(
    trainer.project_name=TimeMaster_EMG
    reward.judge.enable="${JUDGE:-True}"
    reward.judge.base_url="$JUDGE_URL"
    reward.judge.model="$JUDGE_MODEL"
    reward.judge.api_key_env="${JUDGE_KEY_ENV:-OPENAI_API_KEY}"
)
# shellcheck source=example/grpo_trainer/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
