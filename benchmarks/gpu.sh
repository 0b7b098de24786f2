#!/usr/bin/env bash
# All figures that need a GPU, within nine minutes; results/gpu_*.json and .md. Installs nothing.
#
#     PYTHON=python3 benchmarks/gpu.sh
#
# Without a GPU it names the figures, says that none was measured, and writes nothing. A part that
# fails or takes too long is said, and the others go on; then the exit status is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  exec "$PYTHON" benchmarks/gpu.py
fi

failed=0
part() { # SECONDS COMMAND...: run a part, for so long at most
  local limit=$1
  shift
  echo "== $*"
  timeout "$limit" "$@" || { echo "== failed or over ${limit} s (status $?): $*"; failed=1; }
}

part 50 "$PYTHON" benchmarks/gpu.py parity
part 190 "$PYTHON" benchmarks/gpu.py layer
part 90 "$PYTHON" benchmarks/gpu.py step --repeats 5

# The headline: equal steps and one clock, the models take turns on the GPU.
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
part 150 "$PYTHON" benchmarks/gpu_compare.py --runs "$runs/compare" --budget 110s

if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  part 60 "$PYTHON" -m pytest -m gpu tests/kernels tests/training
else
  echo "== tests marked gpu: not run, pytest is not installed"
fi
exit $failed
