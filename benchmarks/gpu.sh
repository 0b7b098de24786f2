#!/usr/bin/env bash
# All figures that need a GPU, within nine minutes; results/gpu_*.json and .md. Installs nothing.
#
#     PYTHON=python3 [OUT=FOLDER] benchmarks/gpu.sh
#
# The headline comes first, and each part writes its results when it ends; with OUT they are copied
# there at once, and the curves of the race are written there as they grow. Without a GPU it names
# the figures, says that none was measured, and writes nothing. A part that fails or takes too long
# is reported, and the others go on; then the exit status is 1.
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
  timeout -k 20 "$limit" "$@" || { echo "== failed or over ${limit} s (status $?): $*"; failed=1; }
  if [ -n "${OUT:-}" ]; then cp benchmarks/results/gpu_* "$OUT"/ 2> /dev/null; fi
}

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  runs=$OUT
else
  runs=$(mktemp -d)
  trap 'rm -rf "$runs"' EXIT
fi
# The headline: equal steps and one clock, the models take turns on the GPU. Reading the text,
# compiling, the last evaluation and saving take a minute more than the budget.
part 180 "$PYTHON" benchmarks/gpu_compare.py --runs "$runs/compare" --budget 120s
rm -rf "$runs"/compare/*/model "$runs"/compare/*/checkpoints

part 40 "$PYTHON" benchmarks/gpu.py parity
# What the autotuner takes is printed, so that what never wins can be left out.
part 110 env TRITON_PRINT_AUTOTUNING=1 "$PYTHON" benchmarks/gpu.py layer --repeats 5
part 45 "$PYTHON" benchmarks/gpu.py step --repeats 5
part 40 "$PYTHON" benchmarks/gpu.py profile
part 45 "$PYTHON" benchmarks/gpu.py decode --repeats 3

if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  # Each test compiles kernels of its own: on all cores where pytest-xdist is there.
  spread=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then spread=(-n 8); fi
  part 80 "$PYTHON" -m pytest "${spread[@]}" -m gpu tests/kernels tests/training
else
  echo "== tests marked gpu: not run, pytest is not installed"
fi
exit $failed
