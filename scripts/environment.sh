#!/usr/bin/env bash
# What the scripts of example/ need of a machine; sourced.
#
# Makes `python3` one that has the packages: the active one if it does, else that of .venv, which is made or completed
# on the way (see setup_venv.sh). Afterwards `flag` and `visible_gpus` can be called.

set -euo pipefail

_tm_here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if ! python3 -c 'import sys, importlib.util as u
sys.exit(not all(map(u.find_spec, ("torch", "transformers", "ray", "hydra", "pyarrow", "matplotlib"))))' 2>/dev/null; then
  # shellcheck source=scripts/setup_venv.sh
  source "$_tm_here/scripts/setup_venv.sh" run
fi

# True or False from what people write; anything else ends the script, for a typo must not choose the other branch.
flag() { # name of a variable
  case "${!1,,}" in
    true | yes | 1) printf -v "$1" True ;;
    false | no | 0 | "") printf -v "$1" False ;;
    *)
      echo "error: $1=${!1}: use True or False" >&2
      exit 2
      ;;
  esac
}

# GPUs that a process started here will see.
visible_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-1 *$/,$d' | grep -c '[^ ]' || true
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  fi
}
