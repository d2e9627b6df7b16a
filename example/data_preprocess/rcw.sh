#!/usr/bin/env bash
# RCW: UEA RightWhaleCalls -> data/rcw_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/rcw.sh                       downloads the archive to ori_data/RightWhaleCalls.zip
#   bash example/data_preprocess/rcw.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/rcw.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository. modality=numeric: digits, no plots.
set -euo pipefail

NAME=rcw
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
ZIP="${RCW_ZIP:-$ROOT/ori_data/RightWhaleCalls.zip}"
URL="${RCW_URL:-https://www.timeseriesclassification.com/aeon-toolkit/RightWhaleCalls.zip}"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$ZIP"
  [[ -e "$ZIP" ]] || download "$URL" "$ZIP" "$URL" "a folder with the unpacked files"
fi

build_data
