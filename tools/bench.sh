#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tools/bench.sh BUILD RESULTS
#
# The measurements of docs/performance.md that need nothing but this build: about half an hour on
# two cores. One is lost at most when it is interrupted: each appends its lines to RESULTS when it
# is through.
set -euo pipefail
[[ $# -eq 2 ]] || { sed -n 's/^# tools/usage: tools/p' "$0" >&2; exit 1; }
build=$1 results=$2
cd "$(dirname "$0")/.."

run() {
  printf '\n== %s\n' "$*"
  "$@"
}

for weights in f32 bf16 int8; do
  run "$build/bench/linear_bench" --model minicpm4-0.5b --weights "$weights" --output "$results"
done
for shape in minicpm4-0.5b minicpm4.1-8b; do
  run "$build/bench/attention_bench" --shape "$shape" --tokens 32768 --every 4 --output "$results"
  run "$build/bench/attention_bench" --shape "$shape" --tokens 65536 --every 8 --output "$results"
  run "$build/bench/attention_bench" --shape "$shape" --mode decode --tokens 65536 \
    --output "$results"
done
for tokens in 4096 8192 16384 131072; do
  run "$build/bench/attention_bench" --shape minicpm4-0.5b --tokens "$tokens" \
    --every $((tokens < 65536 ? 1 : 32)) --output "$results"
done
run "$build/infllm" bench --synthetic minicpm4-0.5b -p 4096 -n 32 -r 3 --jsonl "$results"
run "$build/infllm" bench --synthetic minicpm4-0.5b -p 32768 -n 0 -r 1 --no-warmup \
  --jsonl "$results"
run "$build/infllm" bench --synthetic minicpm4-0.5b -p 0 -n 32 -d 32768 -r 1 --no-warmup \
  --jsonl "$results"
