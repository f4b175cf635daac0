#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs what `make gpu-test` built, on this machine's NVIDIA GPU: the programs in cuda/ that test one
# kernel each, of the common tests those that have a CUDA column's name, cut into shards, and the
# tests of the Python package that need a GPU, file by file, if the package is in FOLDER/../python.
#
#   tools/gpu_test.sh [FOLDER [RESULTS]]     build/cuda/tests and no RESULTS
#   tools/gpu_test.sh --find                 only says which GPU that is, or that there is none
#
# RESULTS gets a line for each program, file or shard: bench/results/README.md. FILTER chooses among
# the common tests, as --gtest_filter takes it (*cuda_*), PYTEST_ADDOPTS among the package's. JOBS,
# LIMIT, and carrying FOLDER to another machine, where INFLLM_COMMIT names the commit: see
# gpu_pool.sh. The package is tested with .venv's interpreter, which it was built for, or else with
# python3.
set -uo pipefail
source "$(dirname "$0")/gpu_pool.sh"
device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || {
  printf 'nvidia-smi finds no GPU to test on; make test runs what needs none\n' >&2
  exit 1
}
device=$(head -n 1 <<<"$device")
if [[ ${1:-} == --find ]]; then
  printf '%s, driver %s\n' "${device%, *}" "${device##*, }"
  exit
fi
folder=${1:-$root/build/cuda/tests} results=${2:-/dev/null}
filter=${FILTER:-*cuda_*}
common=$folder/gpu_kernels tests=0
package=$(dirname "$folder")/python
python=$root/.venv/bin/python
[[ -x "$python" ]] || python=python3
commit=${INFLLM_COMMIT:-$(git -C "$root" rev-parse --short HEAD 2>/dev/null)}
date=$(date -u +%Y-%m-%dT%H:%M:%SZ)

# Passed, skipped and failed: what GoogleTest, pytest and the programs of cuda/ say in these files.
count() {
  cat "$@" | awk '
    /^ok / {++passed}
    /^(BAD|FAIL) / {++failed}
    /^\[  PASSED  \] / {passed += $4}
    /^\[  SKIPPED \] [0-9]+ test/ {skipped += $4}
    /^\[  FAILED  \] .*\./ && !seen[$4]++ {++failed}
    /^[0-9]+ (passed|skipped|failed|error).* in [0-9.]+s/ {
      for (i = 1; i < NF; ++i) {
        if ($(i + 1) ~ /^passed/) passed += $i
        if ($(i + 1) ~ /^skipped/) skipped += $i
        if ($(i + 1) ~ /^(failed|error)/) failed += $i
      }
    }
    END {print passed + 0, skipped + 0, failed + 0}'
}

# The line in RESULTS.
ended() {
  local passed skipped failed ok=false
  read -r passed skipped failed < <(count "$logs/$1")
  [[ $3 != ok ]] || ok=true
  local counts="\"passed\": $passed, \"skipped\": $skipped, \"failed\": $failed, \"ok\": $ok"
  local place="\"device\": \"${device%, *}\", \"driver\": \"${device##*, }\", \"commit\": \"$commit\""
  printf '{"name": "test.gpu", "program": "%s", "shards": %d, %s, "seconds": %d, %s, "date": "%s"}\n' \
    "${1%%.*}" "${GTEST_TOTAL_SHARDS:-1}" "$counts" "$2" "$place" "$date" >>"$results"
}

# First what takes longest.
package_tests=0
if compgen -G "$package/infllm/_native*" >/dev/null; then
  pytest=(env PYTHONPATH="$package" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
    "$python" -B -m pytest -q -p no:cacheprovider --need-gpu -m cuda)
  list=$("${pytest[@]}" --collect-only "$root/python/tests" 2>&1) || {
    printf 'the package cannot be tested:\n%s\n' "$(grep -E '^(E|ERROR)\b' <<<"$list" | tail -n 5)" >&2
    exit 1
  }
  package_tests=$(grep -c '::' <<<"$list")
  for file in $(grep -o '^.*\.py::' <<<"$list" | sort -u); do
    name=$(basename "${file%::}" .py)
    start "python_${name#test_}" "${pytest[@]}" "$root/python/tests/$name.py"
  done
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

# A test that is in no number did not come to its end.
sum() {
  local name=$1 all=$2 passed skipped failed
  shift 2
  read -r passed skipped failed < <(count "$@")
  printf '%s: %d tests, %d passed, %d skipped, %d failed, %d not run\n' "$name" "$all" "$passed" \
    "$skipped" "$failed" $((all - passed - skipped - failed))
}
if ((package_tests > 0)); then
  sum 'Python package' "$package_tests" "$logs"/python_*
fi
if ((tests > 0)); then
  sum gpu_kernels "$tests" "$logs"/gpu_kernels.*[0-9]
  awk '/^\[  FAILED  \] .*\./ && !seen[$4]++ {print "    " $4}' "$logs"/gpu_kernels.*[0-9]
fi
exit "$status"
