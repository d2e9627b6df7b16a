#!/usr/bin/env bash
# EMG: PhysioNet's emgdb (three recordings) -> data/emg_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/emg.sh                       downloads the nine files to ori_data/emgdb
#   bash example/data_preprocess/emg.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/emg.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository.
set -euo pipefail

NAME=emg
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
FOLDER="${EMG_FOLDER:-$ROOT/ori_data/emgdb}"
URL="${EMG_URL:-https://physionet.org/files/emgdb/1.0.0}"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$FOLDER"
  if ! published "$FOLDER" 2>/dev/null; then
    for record in emg_healthy emg_myopathy emg_neuropathy; do
      for extension in hea dat txt; do
        file="$record.$extension"
        [[ -e "$FOLDER/$file" ]] || download "$URL/$file" "$FOLDER/$file" "the files of $URL" "a folder with them"
      done
    done
    published "$FOLDER" || exit 1
  fi
fi

build_data
