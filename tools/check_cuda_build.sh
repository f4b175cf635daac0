#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the program with the CUDA columns, and sees that it starts without a GPU: "auto" takes the
# CPU, and asking for CUDA is answered with what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'check_cuda_build: %s\n' "$*" >&2
  exit 1
}

make cuda
program=build/cuda/infllm
model=models/needle-32k
"$program" inspect "$model" --device auto >/dev/null || fail "--device auto does not open a device"
if nvidia-smi >/dev/null 2>&1; then
  "$program" inspect "$model" --device cuda >/dev/null || fail "--device cuda fails beside a GPU"
else
  answer=$("$program" inspect "$model" --device cuda 2>&1) && fail "--device cuda without a GPU succeeded"
  grep -Eq '^error: no NVIDIA (driver|GPU) here' <<<"$answer" ||
    fail "found the answer \"$answer\", expected what --device cuda misses"
fi
