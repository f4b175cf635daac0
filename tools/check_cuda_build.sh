#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the program and the Python package with the CUDA columns, and sees that they start without
# a GPU: "auto" takes the CPU, and asking for CUDA is answered with what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'check_cuda_build: %s\n' "$*" >&2
  exit 1
}

# The package's flags are those of `make test`, so ccache has every object that is not CUDA's.
flags="-DINFLLM_PYTHON=ON -DPython_EXECUTABLE=$PWD/.venv/bin/python"
tools/install_deps.sh python
make cuda CMAKE_FLAGS="$flags"
read -ra each <<<"$flags"
cmake "${each[@]}" build/cuda >/dev/null  # of a folder that was configured before, too
cmake --build build/cuda --target infllm infllm_python
program=build/cuda/infllm
model=models/needle-32k
"$program" inspect "$model" --device auto >/dev/null || fail "--device auto does not open a device"
PYTHONPATH=build/cuda/python .venv/bin/python -c "import infllm; infllm.available()" ||
  fail "the package with CUDA columns does not load"
if nvidia-smi >/dev/null 2>&1; then
  "$program" inspect "$model" --device cuda >/dev/null || fail "--device cuda fails beside a GPU"
else
  answer=$("$program" inspect "$model" --device cuda 2>&1) && fail "--device cuda without a GPU succeeded"
  grep -Eq '^error: no NVIDIA (driver|GPU) here' <<<"$answer" ||
    fail "found the answer \"$answer\", expected what --device cuda misses"
fi
