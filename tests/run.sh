#!/usr/bin/env bash
# Sets up .venv, then lint, types and tests.
#
#   bash tests/run.sh                    lint, types, unit and integration tests (no GPU, no network)
#   bash tests/run.sh -k packing -x      pytest alone, with these arguments
#   bash tests/run.sh -m slow            the long runs; -m gpu those that need a CUDA device
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/setup_venv.sh
source "$ROOT/scripts/setup_venv.sh" dev
cd "$ROOT"

# One thread a process: tests start several processes, and torch's pools would fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false

if (($# == 0)); then
  python3 -m ruff check .
  python3 -m ruff format --check .
  python3 -m mypy
  # Two files of tests at a time; one file stays in one process, so that its fixtures are made once.
  set -- --numprocesses 2 --dist loadfile
fi
# A later -m or path among the arguments replaces these defaults.
exec python3 -m pytest -m "(unit or integration) and not slow and not gpu" "$@"
