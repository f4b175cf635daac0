#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tools/gpu_bench.sh BUILD RESULTS [PART ...]
#
# The measurements of docs/performance.md that an NVIDIA GPU makes, appended to RESULTS: four minutes
# on an H200. The attention rows get PyTorch's attention beside them (bench/peers_cuda.py) if python3
# has PyTorch with CUDA, and the published kernels (half a minute more) if it has infllm_v2. When it is
# stopped, what was measured is in RESULTS, perhaps without peers. In a copy of the tree without .git,
# INFLLM_COMMIT has to name the commit. Parts, all by default:
#
#   attention   one layer: prompts of 8K to 128K, all kinds of input, one token of many sequences
#   backward    gradients of one layer, and forward and backward together
#   model       the 8B shape with generated weights: writing behind 32K and 128K, reading 128K where
#               neighbours have nothing in common, and much (bench --repeat)
#   long        one layer at 512K and 1M, beside cuDNN's dense attention, which takes 25 s for both
#   million     the 8B shape, writing behind a million tokens
#   calls       the host's time for calls of the Python package, if BUILD/python has it; appended to
#               calls/ beside RESULTS
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n 's/^# tools/usage: tools/p' "$0" >&2; exit 1; }
build=$1 results=$2
shift 2
parts=${*:-attention backward model long million calls}
cd "$(dirname "$0")/.."
[[ -n ${INFLLM_COMMIT:-} ]] || git rev-parse --quiet --verify HEAD >/dev/null 2>&1 || {
  printf 'found no git repository here, expected INFLLM_COMMIT to name the commit\n' >&2
  exit 1
}
ours=$results.part  # lines of device_bench that have not met their peers
text=$(mktemp)
keep() { [[ ! -s $ours ]] || cat "$ours" >>"$results"; rm -f "$ours"; }
trap 'keep; rm -f "$text"' EXIT
trap 'exit 143' TERM INT HUP

run() {
  printf '\n== %s (after %d s)\n' "$*" "$SECONDS"
  "$@"
}
attention() { run "$build/bench/device_bench" --repetitions 3 --output "$ours" "$@"; }
model() {
  run "$build/infllm" bench --synthetic minicpm4.1-8b --device cuda --jsonl "$results" -r 1 "$@"
}
# Moves the lines of device_bench to RESULTS, with peers if there is PyTorch.
with_peers() {
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    run bench/peers_cuda.py --ours "$ours" --output "$results" ||
      printf 'peers_cuda.py stopped: the lines that were left have no peers\n' >&2
  else
    printf 'no PyTorch with CUDA: results without peers\n' >&2
  fi
  keep
}

if [[ " $parts " == *" attention "* ]]; then
  attention --tokens 8192,32768,131072 --input correlated-0.8
  attention --tokens 32768,131072 --input random --dense-limit 0
  for input in correlated-0.9 correlated-0.7; do
    attention --tokens 131072 --input "$input" --dense-limit 0
  done
  cat docs/*.md docs/kernels/*.md > "$text"
  attention --tokens 32768 --input trace --trace-model models/needle-32k --trace-text "$text"
  attention --mode decode --input random --tokens 32768,131072 --batch 1,16,64
  with_peers
fi
if [[ " $parts " == *" backward "* ]]; then
  attention --mode backward --tokens 8192,32768,131072 --input correlated-0.8
  attention --mode backward --tokens 32768,131072 --input random --dense-limit 0
  with_peers
fi
if [[ " $parts " == *" model "* ]]; then
  model -p 0 -n 64 -d 32768,131072 --attention sparse --fill
  model -p 131072 -n 0 --no-warmup --no-steps
  model -p 131072 -n 0 --no-warmup --no-steps --repeat 10  # neighbours share 0.8
fi
if [[ " $parts " == *" long "* ]]; then
  attention --tokens 524288,1048576 --input correlated-0.8 --dense-limit 0
  with_peers
fi
if [[ " $parts " == *" million "* ]]; then
  model -p 0 -n 64 -d 1000000 --attention sparse --no-steps --fill
fi
if [[ " $parts " == *" calls "* ]]; then
  if compgen -G "$build/python/infllm/_native*" >/dev/null; then
    python=.venv/bin/python
    [[ -x $python ]] || python=python3
    PYTHONPATH=$build/python run "$python" bench/python_calls.py \
      --output "$(dirname "$results")/calls/$(basename "$results")"
  else
    printf 'no Python package in %s/python: its calls are not timed\n' "$build" >&2
  fi
fi
