#!/usr/bin/env bash
# GRPO on the CTU data (make it first: example/data_preprocess/ctu.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from (default: with plots the published checkpoint, if its folder
#                    is there, else the last checkpoint of example/sft/run_ctu_sft.sh)
#   MODALITY=numeric the rows with digits in place of the plot (example/data_preprocess/ctu.sh modality=numeric)
#   EVAL=True        score test.parquet with MODEL_PATH's weights and exit
#   PAPER=True       the published protocol: train on all 250 rows, validate on test, keep no best checkpoint
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 2 CPU processes)
#   ENGINE=vllm      rollout engine: vllm or hf (default: vllm on GPUs, hf without)
#   TP=1             GPUs of one vLLM engine
# Arguments are overrides; they come last and win: run_ctu.sh trainer.total_epochs=1 "data.train_files=['a.parquet']"
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/ctu_$MODALITY}

# It was trained on plots.
# shellcheck disable=SC2034 # read by common.sh
[[ $MODALITY != image ]] || _published=./checkpoints/TimeMaster-SFT-Qwen2.5-VL-3B-CTU

# shellcheck disable=SC2034 # read by common.sh
task=(trainer.project_name=TimeMaster_CTU)
# shellcheck source=example/grpo_trainer/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
