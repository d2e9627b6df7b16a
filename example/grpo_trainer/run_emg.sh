#!/usr/bin/env bash
# GRPO on the EMG data (make it first: example/data_preprocess/emg.sh). From the environment:
#   MODEL_PATH=DIR   a Hugging Face folder to start from (default: the last checkpoint of example/sft/run_emg_sft.sh)
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

MODEL_PATH=${MODEL_PATH:-}
EVAL=${EVAL:-False}
PAPER=${PAPER:-False}
MODALITY=${MODALITY:-image}
DATA=${DATA:-./data/emg_$MODALITY}

JUDGE=${JUDGE:-True}
JUDGE_KEY_ENV=${JUDGE_KEY_ENV:-OPENAI_API_KEY}
JUDGE_URL=${JUDGE_URL:-https://api.openai.com/v1}
JUDGE_MODEL=${JUDGE_MODEL:-gpt-4o}

# shellcheck disable=SC2034 # read by common.sh
task=(trainer.project_name=TimeMaster_EMG)

# Without its key the judge would end the run only after the models are loaded. A cluster that was there before has the
# environment of its own `ray start`, and overrides may change the judge: there the run itself finds out.
# shellcheck disable=SC2317,SC2329 # common.sh calls it
complete_task() {
    flag JUDGE
    [[ $JUDGE == True ]] || return 0
    task+=(
        reward.judge.enable=True
        reward.judge.base_url="$JUDGE_URL"
        reward.judge.model="$JUDGE_MODEL"
        reward.judge.api_key_env="$JUDGE_KEY_ENV"
    )
    [[ $JUDGE_KEY_ENV != null && -z $(printenv -- "$JUDGE_KEY_ENV") && -z ${RAY_ADDRESS:-} ]] || return 0
    [[ ! "$*" =~ reward\.judge\.(enable|api_key_env)= ]] || return 0
    echo "error: no judge: $JUDGE_KEY_ENV, which holds the key for $JUDGE_URL, is not set. Set it, or JUDGE_URL," \
        "JUDGE_MODEL and JUDGE_KEY_ENV for another server (JUDGE_KEY_ENV=null: it asks for none), or JUDGE=False:" \
        "class and format alone" >&2
    exit 2
}
# shellcheck source=example/grpo_trainer/common.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
