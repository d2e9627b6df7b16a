#!/usr/bin/env bash
# ECG: PhysioNet/CinC Challenge 2017 -> data/ecg_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/ecg.sh                       downloads the archive to ori_data/cinc2017
#   bash example/data_preprocess/ecg.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/ecg.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository. modality=numeric: digits, no plots.
set -euo pipefail

NAME=ecg
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
FOLDER="${ECG_FOLDER:-$ROOT/ori_data/cinc2017}"
URL="${ECG_URL:-https://physionet.org/files/challenge-2017/1.0.0}"
ZIP="$FOLDER.zip"
REFERENCE="$FOLDER/training2017/REFERENCE-v3.csv"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$FOLDER"
  if [[ ! -e "$REFERENCE" ]]; then
    [[ -e "$ZIP" ]] || download "$URL/training2017.zip" "$ZIP" "training2017.zip and REFERENCE-v3.csv of $URL" \
      "a folder with the unpacked files"
    python3 -m verl.timeseries.unpack task=ecg "into=$FOLDER" "zip=$ZIP"
    # The corrected labels are not in the zip; written last, so that their presence says all is here.
    download "$URL/REFERENCE-v3.csv" "$REFERENCE" "training2017.zip and REFERENCE-v3.csv of $URL" \
      "a folder with the unpacked files"
  fi
fi

build_data
