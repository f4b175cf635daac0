#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tools/gpu_bench.sh BUILD RESULTS [PART ...]
#
# The measurements of docs/performance.md that an NVIDIA GPU makes, appended to RESULTS. Parts:
# prefill decode model; all of them by default, some ten minutes on an H200. The attention rows get
# PyTorch's attention beside them (bench/peers_cuda.py) if python3 has PyTorch with CUDA.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n 's/^# tools/usage: tools/p' "$0" >&2; exit 1; }
build=$1 results=$2
shift 2
parts=${*:-prefill decode model}
cd "$(dirname "$0")/.."
ours=$(mktemp)
trap 'rm -f "$ours" "$ours.txt"' EXIT

run() {
  printf '\n== %s\n' "$*"
  "$@"
}
attention() { run "$build/bench/device_bench" --output "$ours" "$@"; }
model() {
  run "$build/infllm" bench --synthetic minicpm4.1-8b --device cuda --jsonl "$results" "$@"
}

if [[ " $parts " == *" prefill "* ]]; then
  attention --tokens 8192,32768,131072,524288,1048576 --input correlated-0.8 --dense-limit 131072
  for input in random correlated-0.9 correlated-0.7; do
    attention --tokens 32768,131072 --input "$input" --dense-limit 0
  done
  cat docs/*.md docs/kernels/*.md > "$ours.txt"
  attention --tokens 32768 --input trace --trace-model models/needle-32k --trace-text "$ours.txt"
fi
if [[ " $parts " == *" decode "* ]]; then
  attention --mode decode --input random --tokens 32768,131072 --batch 1,16,64
fi
if [[ -s $ours ]]; then
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    run bench/peers_cuda.py --ours "$ours" --output "$results"
  else
    printf 'no PyTorch with CUDA: results without peers\n' >&2
    cat "$ours" >> "$results"
  fi
fi
if [[ " $parts " == *" model "* ]]; then
  model -p 32768,131072 -n 0 -r 2
  model -p 0 -n 64 -d 32768,131072 -r 2
  model -p 0 -n 64 -d 1000000 -r 1 --no-warmup --no-steps --attention sparse
fi
