#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs what `make gpu-test` built, on this machine's NVIDIA GPU: the programs in cuda/ that test one
# kernel each, and of the common tests those that have a CUDA column's name, cut into shards.
#
#   tools/gpu_test.sh [FOLDER]     build/cuda/tests
#
# FILTER chooses among the common tests, as --gtest_filter takes it (*cuda_*). JOBS, LIMIT, and
# carrying FOLDER to another machine: see gpu_pool.sh.
set -uo pipefail
source "$(dirname "$0")/gpu_pool.sh"
folder=${1:-$root/build/cuda/tests}
filter=${FILTER:-*cuda_*}
common=$folder/gpu_kernels tests=0

for program in "$folder"/cuda/*; do
  [[ -f "$program" && -x "$program" ]] && start "$(basename "$program")" "$program" check
done
if [[ -x "$common" ]]; then
  tests=$("$common" --gtest_list_tests --gtest_filter="$filter" | grep -c '^  ')
  start_shards gpu_kernels $((tests < jobs ? tests : jobs)) \
    "$common" --gtest_filter="$filter" --gtest_brief=1
fi
finish
status=$?

# What GoogleTest counted, in all shards; a test that is in no number did not come to its end.
if ((tests > 0)); then
  cat "$logs"/gpu_kernels.*[0-9] | awk -v all="$tests" '
    /^\[  PASSED  \] / {passed += $4}
    /^\[  SKIPPED \] [0-9]+ test/ {skipped += $4}
    /^\[  FAILED  \] / {list[failed++] = $4}
    END {
      printf "gpu_kernels: %d tests, %d passed, %d skipped, %d failed, %d not run\n", all, passed,
        skipped, failed, all - passed - skipped - failed
      for (i = 0; i < failed; ++i) print "    " list[i]
    }'
fi
exit "$status"
