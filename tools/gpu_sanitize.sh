#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs small cases of what `make gpu-test` runs under NVIDIA's compute-sanitizer, on this machine's
# GPU: memcheck, racecheck, synccheck, initcheck. A line for each tool and program.
#
#   tools/gpu_sanitize.sh [FOLDER [TOOL ...]]     build/cuda/tests
#
# Of the common tests, FILTER (below): every step, at the edges of windows, blocks and chunks; fewer
# for racecheck, which takes minutes. racecheck does not see Hopper's prefill attention and its
# gradients: where one thread arrives at an mbarrier for all that met at a named barrier, as there,
# it reports a race in a program that has none (bench/probes/race_probe.cu; asked on an H200). A
# real race of those kernels would go unseen here. The recorded graphs are left to
# tools/gpu_test.sh, as the sanitizer runs their kernels one by one. JOBS, LIMIT, and carrying
# FOLDER to another machine: see gpu_pool.sh.
set -uo pipefail
source "$(dirname "$0")/gpu_pool.sh"
folder=${1:-$root/build/cuda/tests}
shift $(($# > 0))
[[ $# -gt 0 ]] || set -- memcheck racecheck synccheck initcheck
few='*cuda_0_*_edges_decode:*cuda_0_*_group_7:*cuda_0_*_group_16'
many="$few:*TransformerTest*cuda_*:*LinearTest*cuda_*:*TopLogits*cuda_*:*RopeAppend*cuda_*:*Edge*cuda_*"
for name in edges_prefill budget_edge group_32 chunked taking_turns; do many+=":*cuda_0_*_$name"; done
export sanitizer
sanitizer=$(command -v compute-sanitizer /usr/local/cuda/bin/compute-sanitizer | head -n 1)
[[ -n "$sanitizer" ]] || { printf 'found no compute-sanitizer, expected it in PATH\n' >&2; exit 1; }

# sanitize TOOL COMMAND...: fails on a finding. Failing calls of CUDA are no finding, as tests of
# refusals provoke them. For initcheck, memory is left as it comes, and results may differ.
sanitize() {
  local tool=$1 status
  shift
  [[ $tool == initcheck ]] && export INFLLM_UNPOISONED=1
  "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 99 "$@"
  status=$?
  [[ $status == 0 || ($tool == initcheck && $status == 1) ]]
}
export -f sanitize

for tool in "$@"; do
  for program in "$folder"/cuda/*; do
    [[ -f "$program" && -x "$program" ]] || continue
    words=(tiny)
    if [[ $tool == racecheck ]]; then
      [[ $(basename "$program") == sm90_attend_main ]] && continue
      [[ $(basename "$program") == backward_main ]] && words=(sm80 tiny)
    fi
    start "$tool.$(basename "$program")" bash -c 'sanitize "$@"' - "$tool" "$program" "${words[@]}"
  done
  [[ -x "$folder/gpu_kernels" ]] || continue
  filter=$many
  [[ $tool == racecheck ]] && filter="$few-*Att*cuda_0_sm90*_group_16"
  start_shards "$tool.gpu_kernels" 8 \
    bash -c 'sanitize "$@"' - "$tool" "$folder/gpu_kernels" --gtest_filter="${FILTER:-$filter}" --gtest_brief=1
done
finish
