#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs what `make gpu-test` built, on this machine's NVIDIA GPU: the programs in cuda/ that test one
# kernel each, of the common tests those that have a CUDA column's name, cut into shards, and the
# tests of the Python package that need a GPU, if the package is in FOLDER/../python.
#
#   tools/gpu_test.sh [FOLDER]     build/cuda/tests
#
# FILTER chooses among the common tests, as --gtest_filter takes it (*cuda_*). JOBS, LIMIT, and
# carrying FOLDER to another machine: see gpu_pool.sh. The package is tested with .venv's
# interpreter, which it was built for, or else with python3.
set -uo pipefail
source "$(dirname "$0")/gpu_pool.sh"
folder=${1:-$root/build/cuda/tests}
filter=${FILTER:-*cuda_*}
common=$folder/gpu_kernels tests=0
package=$(dirname "$folder")/python
python=$root/.venv/bin/python
[[ -x "$python" ]] || python=python3

if compgen -G "$package/infllm/_native*" >/dev/null; then
  PYTHONPATH=$package start python_package \
    "$python" -B -m pytest -q -p no:cacheprovider -m cuda "$root/python/tests"
fi
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
[[ ! -s "$logs/python_package" ]] || printf 'python_package: %s\n' "$(tail -n 1 "$logs/python_package")"

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
