#!/usr/bin/env bash
# HAR: UCI HAR, Inertial Signals -> data/har_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/har.sh                       downloads the archive to ori_data/UCI_HAR.zip
#   bash example/data_preprocess/har.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/har.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository. modality=numeric: digits, no plots.
set -euo pipefail

NAME=har
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
ZIP="${HAR_ZIP:-$ROOT/ori_data/UCI_HAR.zip}"
URL="${HAR_URL:-https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip}"

# shellcheck source=example/data_preprocess/common.sh
source "$ROOT/example/data_preprocess/common.sh"
parse_arguments "$@"

if [[ -z "$SOURCE" ]]; then
  SOURCE="$ZIP"
  [[ -e "$ZIP" ]] || download "$URL" "$ZIP" "$URL" "a folder with the unpacked files"
fi

build_data
