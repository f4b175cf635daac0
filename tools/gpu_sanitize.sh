#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs small cases of what `make gpu-test` runs under NVIDIA's compute-sanitizer, on this machine's
# GPU: racecheck, synccheck, initcheck, memcheck. A line for each tool and program, here and in
# RESULTS (bench/results/README.md); docs/verification.md says what the tools see.
#
#   tools/gpu_sanitize.sh [FOLDER [RESULTS [TOOL ...]]]     build/cuda/tests and no RESULTS
#
# Of the common tests, FILTER (below): every step, at the edges of windows, blocks and chunks; for
# racecheck, which takes longest, what the programs do not have, and attention as a whole. The
# recorded graphs are left to tools/gpu_test.sh, as the sanitizer runs their kernels one by one.
# COMPUTE_SANITIZER names the program; else it is .venv's, where the group "sanitize" of
# docs/dependencies.md puts it, or the CUDA toolkit's. JOBS, LIMIT, and carrying FOLDER to another
# machine, where INFLLM_COMMIT names the commit: see gpu_pool.sh.
set -uo pipefail
source "$(dirname "$0")/gpu_pool.sh"
folder=${1:-$root/build/cuda/tests} results=${2:-/dev/null}
shift $(($# < 2 ? $# : 2))
[[ $# -gt 0 ]] || set -- racecheck synccheck initcheck memcheck
steps='*TransformerTest*cuda_*:*LinearTest*cuda_*:*TopLogits*cuda_*:*RopeAppend*cuda_*:*Pieces*cuda_*'
few="$steps:*KvCacheEdge*cuda_*:*AttentionTest*cuda_0_*_edges_decode"
for name in KvCache Compress Align; do
  few+=":*${name}Test*cuda_0_*_edges_decode:*${name}Test*cuda_0_*_taking_turns"
done
many="$steps:*Edge*cuda_*"
for name in edges_decode edges_prefill budget_edge group_7 group_16 group_32 chunked taking_turns; do
  many+=":*cuda_0_*_$name"
done
own=("$root"/.venv/lib/python3*/site-packages/nvidia/cu13/bin/compute-sanitizer)
export sanitizer
sanitizer=${COMPUTE_SANITIZER:-$(command -v "${own[@]}" compute-sanitizer \
  /usr/local/cuda/bin/compute-sanitizer | head -n 1)}
[[ -n "$sanitizer" ]] || {
  printf 'found no compute-sanitizer; tools/install_deps.sh sanitize installs it\n' >&2
  exit 1
}
version=$("$sanitizer" --version | awk '/^Version/ {print $2}')
device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
commit=${INFLLM_COMMIT:-$(git -C "$root" rev-parse --short HEAD 2>/dev/null)}
date=$(date -u +%Y-%m-%dT%H:%M:%SZ)

# sanitize TOOL PROGRAM ...: fails on a finding. Failing calls of CUDA are no finding, as tests of
# refusals provoke them. racecheck judges no library's kernels. For initcheck, memory is left as it
# comes; what the host reads back is not judged, because no cell has to write the rows of tokens that
# do not exist. memcheck's checks of the copy engine take arrays at multiples of 64 bytes for
# misaligned, where 16 are asked for; the common tests have such.
sanitize() {
  local tool=$1 options=(--report-api-errors no)
  shift
  case $tool in
    racecheck) options+=(--kernel-name kns=infllm) ;;
    initcheck)
      export INFLLM_UNPOISONED=1
      options=(--check-api-memory-access no)
      ;;
    memcheck)
      [[ $1 == */gpu_kernels ]] || ! "$sanitizer" --help | grep -q check-tensor-ops ||
        options+=(--check-tensor-ops yes)
      ;;
  esac
  "$sanitizer" --tool "$tool" "${options[@]}" --error-exitcode 99 "$@"
}
export -f sanitize

# The line in RESULTS. A tool that was stopped has no summary.
ended() {
  local tool=${1%%.*} program=${1#*.}
  awk -v tool="$tool" -v program="${program%%.*}" -v seconds="$2" -v version="$version" \
    -v device="${device%, *}" -v driver="${device##*, }" -v commit="$commit" -v date="$date" \
    -v shards="${GTEST_TOTAL_SHARDS:-1}" '
    /^(ok|BAD|FAIL) / {++cases}
    / tests? from .* ran\./ {cases += $2}
    /^=+ (ERROR|RACECHECK) SUMMARY: / {finished = 1; if (!/not printed/) reports += $4}
    END {
      printf "{\"name\": \"sanitizer.%s\", \"program\": \"%s\", \"shards\": %d, \"cases\": %d, ",
        tool, program, shards, cases
      printf "\"reports\": %d, \"seconds\": %d, \"finished\": %s, \"version\": \"%s\", ", reports,
        seconds, finished ? "true" : "false", version
      printf "\"device\": \"%s\", ", device
      printf "\"driver\": \"%s\", \"commit\": \"%s\", \"date\": \"%s\"}\n", driver, commit, date
    }' "$logs/$1" >>"$results"
}

for tool in "$@"; do
  for program in "$folder"/cuda/*; do
    [[ -f "$program" && -x "$program" ]] || continue
    name=$(basename "$program") shards=1
    [[ $tool == racecheck && $name != tile_* ]] && shards=3  # tests/cuda/shard.h
    start_shards "$tool.$name" $shards bash -c 'sanitize "$@"' - "$tool" "$program" tiny
  done
done
for tool in "$@"; do
  [[ -x "$folder/gpu_kernels" ]] || continue
  filter=$many
  [[ $tool != racecheck ]] || filter=$few
  start_shards "$tool.gpu_kernels" "$jobs" bash -c 'sanitize "$@"' - \
    "$tool" "$folder/gpu_kernels" --gtest_filter="${FILTER:-$filter}" --gtest_brief=1
done
finish
