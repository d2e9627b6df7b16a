#!/usr/bin/env bash
# TEE: UCR Lightning7 -> data/tee_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/tee.sh                       downloads the archive to ori_data/Lightning7.zip
#   bash example/data_preprocess/tee.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/tee.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository. modality=numeric: digits, no plots.
set -euo pipefail

NAME="tee"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
ZIP="${TEE_ZIP:-$ROOT/ori_data/Lightning7.zip}"
URL="${TEE_URL:-https://www.timeseriesclassification.com/aeon-toolkit/Lightning7.zip}"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$ZIP"
  [[ -e "$ZIP" ]] || download "$URL" "$ZIP" "$URL" "a folder with the unpacked files"
fi

build_data
