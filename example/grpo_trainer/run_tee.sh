#!/usr/bin/env bash
# GRPO on the TEE data (make it first: example/data_preprocess/tee.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from (default: the last checkpoint of example/sft/run_tee_sft.sh)
#   MODALITY=numeric the rows with digits in place of the plot (example/data_preprocess/tee.sh modality=numeric)
#   EVAL=True        score test.parquet with MODEL_PATH's weights and exit
#   PAPER=True       the published protocol: train on all train rows, validate on test, keep no best checkpoint
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 2 CPU processes)
#   ENGINE=vllm      rollout engine: vllm or hf (default: vllm on GPUs, hf without)
#   TP=1             GPUs of one vLLM engine
# Arguments are overrides; they come last and win: run_tee.sh trainer.total_epochs=1 "data.train_files=['a.parquet']"
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/tee_$MODALITY}

# shellcheck disable=SC2034 # read by common.sh
task=(trainer.project_name=TimeMaster_TEE)
# shellcheck source=example/grpo_trainer/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
