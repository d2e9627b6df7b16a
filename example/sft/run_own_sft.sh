#!/usr/bin/env bash
# The supervised start on a data set of your own (docs/own_data.md). From the environment:
#   NAME=pumps       name of the data set: its data lie in data/NAME_image
#   MODEL_PATH=DIR   a Hugging Face folder to start from
#   MODALITY=numeric the rows with digits in place of the plot (data step with modality=numeric)
#   DATA=DIR         another data folder, such as that of written answers (docs/sft.md)
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 1 CPU process)
# Its last checkpoint, checkpoints/TimeMaster_NAME/sft_image/global_step_N/actor/huggingface, is the MODEL_PATH of
# example/grpo_trainer/run_own.sh. Arguments are overrides; they come last and win.
set -euo pipefail

NAME=${NAME:?is not set: give the name of the data set, NAME=pumps}
MODEL_PATH=${MODEL_PATH:-./checkpoints/Qwen2.5-VL-3B-Instruct}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/${NAME}_$MODALITY}

# shellcheck disable=SC2034 # read by common.sh
task=("trainer.project_name=TimeMaster_${NAME^^}")
# shellcheck source=example/sft/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
