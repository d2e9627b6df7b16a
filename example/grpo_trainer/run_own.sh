#!/usr/bin/env bash
# GRPO on a data set of your own (docs/own_data.md). From the environment:
#   NAME=pumps       name of the data set: its data lie in data/NAME_image (or DATA=DIR)
#   MODEL_PATH=DIR   a Hugging Face folder to start from (default: the last checkpoint of example/sft/run_own_sft.sh)
#   MODALITY=numeric the rows with digits in place of the plot (data step with modality=numeric)
#   EVAL=True        score test.parquet with MODEL_PATH's weights and exit
#   PAPER=True       the published protocol: train on all train rows, validate on test, keep no best checkpoint
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 2 CPU processes)
#   ENGINE=hf        rollout engine
#   TP=1             GPUs of one vLLM engine
# Arguments are overrides; they come last and win: run_own.sh trainer.total_epochs=1 "data.train_files=['a.parquet']"
set -euo pipefail

NAME=${NAME:?is not set: give the name of the data set, NAME=pumps}
MODEL_PATH=${MODEL_PATH:-}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/${NAME}_$MODALITY}

# shellcheck disable=SC2034 # read by common.sh
_task_name=$NAME

# shellcheck disable=SC2034 # read by common.sh
task=("trainer.project_name=TimeMaster_${NAME^^}")
# shellcheck source=example/grpo_trainer/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
