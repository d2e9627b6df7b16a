#!/usr/bin/env bash
# CTU: the Computers archive -> data/ctu_image (plots, Arrow, parquet).
#
#   bash example/data_preprocess/ctu.sh                       downloads the archive to ori_data/Computers
#   bash example/data_preprocess/ctu.sh --source PATH         uses a folder or a zip that is here already
#   bash example/data_preprocess/ctu.sh [...] key=value ...   further arguments of verl.timeseries.build
#
# Paths you give are relative to where you stand; the defaults lie in the repository.
set -euo pipefail

URL="${CTU_URL:-https://www.timeseriesclassification.com/aeon-toolkit/Computers.zip}"
HERE="$PWD"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
FOLDER="${CTU_FOLDER:-$ROOT/ori_data/Computers}"
ZIP="$FOLDER.zip"

PYTHON="$ROOT/.venv/bin/python"
[[ -x "$PYTHON" ]] || PYTHON=python3
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

absolute() {
  case "$1" in
    /* | "~"* | null | auto) printf '%s' "$1" ;;
    *) printf '%s/%s' "$HERE" "$1" ;;
  esac
}

SOURCE=""
OUTPUT="$ROOT/data/ctu_image"
ARGS=()
while (($#)); do
  case "$1" in
    --source)
      [[ $# -ge 2 ]] || { echo "error: --source needs a folder or a zip" >&2; exit 2; }
      SOURCE="$(absolute "$2")"
      shift
      ;;
    --source=*) SOURCE="$(absolute "${1#--source=}")" ;;
    source=*) SOURCE="$(absolute "${1#source=}")" ;;
    output=*) OUTPUT="$(absolute "${1#output=}")" ;;
    cache=*) ARGS+=("cache=$(absolute "${1#cache=}")") ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) ARGS+=("$1") ;;
  esac
  shift
done

fetch() {
  curl --fail --location --silent --show-error --retry 2 \
    --connect-timeout 20 --max-time 900 --speed-limit 1000 --speed-time 60 \
    --continue-at - --output "$ZIP.part" "$URL"
}

download() {
  local status=0
  mkdir -p "$(dirname "$ZIP")"
  echo "downloading $URL"
  fetch || status=$?
  if ((status == 22 || status == 33 || status == 36)) && [[ -e "$ZIP.part" ]]; then
    # The server cannot continue the part that lies here: start over once.
    rm -f "$ZIP.part"
    status=0
    fetch || status=$?
  fi
  if ((status)); then
    cat >&2 <<EOF
error: could not download $URL (curl exit code $status).
Without a network: fetch Computers.zip on another machine, copy it here, and run
  bash example/data_preprocess/ctu.sh --source /path/to/Computers.zip
A folder with the unpacked files works too. A broken-off download goes on when you run this again.
EOF
    exit 1
  fi
  mv "$ZIP.part" "$ZIP"
}

if [[ -z "$SOURCE" ]]; then
  SOURCE="$FOLDER"
  if ! "$PYTHON" -m verl.timeseries.unpack task=ctu "into=$FOLDER" 2>/dev/null; then
    [[ -e "$ZIP" ]] || download
    status=0
    "$PYTHON" -m verl.timeseries.unpack task=ctu "into=$FOLDER" "zip=$ZIP" || status=$?
    if ((status == 2)); then
      rm -f "$ZIP"
      echo "error: $ZIP is not the published archive and was removed; run this again" >&2
    fi
    ((status == 0)) || exit 1
  fi
fi

exec "$PYTHON" -m verl.timeseries.build task=ctu modality=image "source=$SOURCE" "output=$OUTPUT" ${ARGS[@]+"${ARGS[@]}"}
