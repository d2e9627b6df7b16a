#!/usr/bin/env bash
# CTU: the Computers archive -> data/ctu_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/ctu.sh                       downloads the archive to ori_data/Computers
#   bash example/data_preprocess/ctu.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/ctu.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository.
set -euo pipefail

NAME=ctu
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
FOLDER="${CTU_FOLDER:-$ROOT/ori_data/Computers}"
URL="${CTU_URL:-https://www.timeseriesclassification.com/aeon-toolkit/Computers.zip}"
ZIP="$FOLDER.zip"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$FOLDER"
  if ! published "$FOLDER" 2>/dev/null; then
    [[ -e "$ZIP" ]] || download "$URL" "$ZIP" Computers.zip "a folder with the unpacked files"
    status=0
    python3 -m verl.timeseries.unpack task=ctu "into=$FOLDER" "zip=$ZIP" || status=$?
    if ((status == 2)); then
      rm -f "$ZIP"
      echo "error: $ZIP is not the published archive and was removed; run this again" >&2
    fi
    ((status == 0)) || exit 1
  fi
fi

build_data
