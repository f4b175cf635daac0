#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the program with the CUDA columns, on a machine without a GPU, and sees that it starts, that
# "auto" means the CPU, and that asking for CUDA is answered with what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

make cuda
program=build/cuda/infllm
"$program" --version
answer=$("$program" run models/none --device cuda -p hello 2>&1) && {
  printf 'check_cuda_build: --device cuda succeeded without a model\n' >&2
  exit 1
}
printf '%s\n' "$answer"
