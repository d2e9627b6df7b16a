#!/usr/bin/env bash
# What the data scripts of all tasks share; sourced by <task>.sh, which sets NAME, ROOT and FOLDER.
set -euo pipefail

HERE="$PWD"
# shellcheck source=scripts/environment.sh
source "$ROOT/scripts/environment.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

SOURCE=""
MODALITY=image
OUTPUT=""
ARGS=()

absolute() {
  case "$1" in
    /* | "~"* | null | auto) printf '%s' "$1" ;;
    *) printf '%s/%s' "$HERE" "$1" ;;
  esac
}

# Sets SOURCE, OUTPUT, MODALITY and ARGS.
parse_arguments() {
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
      modality=*) MODALITY="${1#modality=}" ;;
      cache=*) ARGS+=("cache=$(absolute "${1#cache=}")") ;;
      -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
  OUTPUT="${OUTPUT:-$ROOT/data/${NAME}_$MODALITY}"
}

fetch() { # url, target
  curl --fail --location --silent --show-error --retry 2 \
    --connect-timeout 20 --max-time 900 --speed-limit 1000 --speed-time 60 \
    --continue-at - --output "$2.part" "$1"
}

# What to bring by hand is said in words when there is no network.
download() { # url, target, what to fetch, what else works
  local status=0
  mkdir -p "$(dirname "$2")"
  echo "downloading $1"
  fetch "$1" "$2" || status=$?
  if ((status == 22 || status == 33 || status == 36)) && [[ -e "$2.part" ]]; then
    # The server cannot continue the part that lies here: start over once.
    rm -f "$2.part"
    status=0
    fetch "$1" "$2" || status=$?
  fi
  if ((status)); then
    cat >&2 <<EOF
error: could not download $1 (curl exit code $status).
Without a network: fetch $3 on another machine, copy it here, and run
  bash example/data_preprocess/$NAME.sh --source /path/to/it
${4^} works too. A broken-off download goes on when you run this again.
EOF
    exit 1
  fi
  mv "$2.part" "$2"
}

# Whether the folder holds the published files, by checksum; what does not is said on stderr.
published() { # folder
  python3 -m verl.timeseries.unpack "task=$NAME" "into=$1"
}

build_data() {
  exec python3 -m verl.timeseries.build "task=$NAME" "modality=$MODALITY" "source=$SOURCE" "output=$OUTPUT" \
    ${ARGS[@]+"${ARGS[@]}"}
}
