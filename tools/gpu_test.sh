#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs what `make gpu-test` built, on this machine's NVIDIA GPU: of the common tests those that have a
# CUDA column's name, then the programs in cuda/ that test one kernel each. A line a program.
#
#   tools/gpu_test.sh [FOLDER]     build/cuda/tests
#
# The programs run where they are, so a folder that was built elsewhere can be carried here.
set -uo pipefail
folder=${1:-build/cuda/tests}
failed=0

check() {
  local name=$1 start=$SECONDS log
  shift
  if log=$("$@" 2>&1); then
    printf 'ok      %-22s %3d s\n' "$name" $((SECONDS - start))
  else
    printf 'FAILED  %-22s %3d s\n%s\n' "$name" $((SECONDS - start)) "$(tail -n 40 <<<"$log")"
    failed=1
  fi
}

for program in "$folder"/gpu_kernels "$folder"/engine_test; do
  [[ -x "$program" ]] || continue
  "$program" --gtest_list_tests --gtest_filter='*cuda_*' 2>/dev/null | grep -q . || continue
  check "$(basename "$program")" "$program" --gtest_filter='*cuda_*' --gtest_brief=1
done
for program in "$folder"/cuda/*; do
  [[ -f "$program" && -x "$program" ]] && check "$(basename "$program")" "$program" check
done
exit "$failed"
