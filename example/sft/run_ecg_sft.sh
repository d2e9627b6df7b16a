#!/usr/bin/env bash
# The supervised start of ECG (make the data first: example/data_preprocess/ecg.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from
#   MODALITY=numeric the rows with digits in place of the plot (example/data_preprocess/ecg.sh modality=numeric)
#   DATA=DIR         another data folder, such as that of written answers (docs/sft.md)
#   N_GPUS=4         ranks on this machine (default: its GPUs; without one, 1 CPU process)
# Its last checkpoint, checkpoints/TimeMaster_ECG/sft_image/global_step_N/actor/huggingface, is the MODEL_PATH of
# example/grpo_trainer/run_ecg.sh. Arguments are overrides; they come last and win.
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-./checkpoints/Qwen2.5-VL-3B-Instruct}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/ecg_$MODALITY}

# shellcheck disable=SC2034 # read by common.sh
task=(trainer.project_name=TimeMaster_ECG)
# shellcheck source=example/sft/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
