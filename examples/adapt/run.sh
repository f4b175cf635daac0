#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The whole experiment within a given time on the GPUs there are: pretraining on all of them, then
# arms and evaluations one a GPU, the next as one becomes free. Ends in time and leaves what there is;
# arms that a deadline cuts short have no equal budgets, so give it the seconds that its steps need.
#
#   examples/adapt/run.sh OUT SECONDS [CONFIG]
#
# needs .train/adapt/text and .train/adapt/tokenizer (text.py, tokenizer.py) and `import infllm`.
# OUT gets results.jsonl, the logs, and one folder a run with its checkpoint and state. Started again,
# it goes on: a run that has its run.jsonl is done. ADAPT_UNTIL=short stops before the arms;
# ADAPT_STRETCH multiplies the configuration's steps. A training step is timed while ids are made.
set -u
OUT=$1 TOTAL=$2
HERE=$(dirname "$0") CONFIG=${3:-$(dirname "$0")/configs/h200.toml}
START=$(date +%s)
GPUS=$(nvidia-smi -L | wc -l)
CORES=$(env -u OMP_NUM_THREADS nproc)  # which heeds that variable
WORKERS=$(( CORES / GPUS > 2 ? CORES / GPUS - 1 : 1 ))
ARMS=(dense sparse aligned)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
mkdir -p "$OUT"
at() { echo $(( START + TOTAL * $1 / 1000 )); }  # the time at so many thousandths
left() { echo $(( $(at "$1") - $(date +%s) )); }
say() { echo "== $(( $(date +%s) - START )) s: $*"; }

# Thousandths at which pretraining ends, the last arm ends, and evaluations stop.
WAVES=$(( (${#ARMS[@]} + GPUS - 1) / GPUS ))
SHORT=365 LAST=870 STOP=960
[ "${ADAPT_UNTIL:-}" = short ] && SHORT=960

made=
if [ ! -e .train/adapt/data/words.txt ]; then
  python3 "$HERE/documents.py" --processes $(( CORES > 4 ? CORES - 4 : 1 )) &
  made=$!
fi
if [ ! -e "$OUT/step.log" ]; then  # compiles what all runs need
  timeout -k 5 60 python3 "$HERE/bench_step.py" --config "$CONFIG" --lengths 4096 32768 \
    --out "$OUT/step.jsonl" > "$OUT/step.log" 2>&1
fi
[ -z "$made" ] || wait "$made" || exit 1
for processes in "$GPUS" 1; do  # one, should several not work together
  [ -e "$OUT/short/run.jsonl" ] && break
  say "pretraining on $processes GPUs, $WORKERS makers of samples each"
  torchrun --nproc-per-node "$processes" "$HERE/train.py" --config "$CONFIG" --phase pretrain --out "$OUT/short" \
    --workers $WORKERS --stretch "${ADAPT_STRETCH:-1}" --deadline "$(at $SHORT)" >> "$OUT/short.log" 2>&1
  tail -n 1 "$OUT/short.log"
done

[ -e "$OUT/short/run.jsonl" ] || { echo "no pretraining: see $OUT/short.log"; exit 1; }

# A pipe holds the free GPUs.
rm -f "$OUT/free"; mkfifo "$OUT/free"; exec 3<> "$OUT/free"
for (( g = 0; g < GPUS; g++ )); do echo $g >&3; done
on_free_gpu() {  # runs its arguments with a GPU of their own
  read -r -u 3 gpu
  say "GPU $gpu: $*"
  ( CUDA_VISIBLE_DEVICES=$gpu "$@"; echo "$gpu" >&3 ) &
}
continued() {  # arm, Unix time of its end
  python3 "$HERE/train.py" --config "$CONFIG" --phase adapt --arm "$1" --init "$OUT/short/model" \
    --out "$OUT/$1" --workers $WORKERS --stretch "${ADAPT_STRETCH:-1}" --deadline "$2" >> "$OUT/$1.log" 2>&1
  [ -e "$OUT/$1/run.jsonl" ] || touch "$OUT/$1.failed"
}
evaluated() {  # run, name of the log, more options
  grep -qs "evaluated in" "$OUT/$2.eval.log" && return
  until [ -e "$OUT/$1/run.jsonl" ]; do
    [ -e "$OUT/$1.failed" ] || (( $(left $STOP) < 0 )) && return
    sleep 1
  done
  rm -f "$OUT/$2.eval.jsonl"
  timeout -k 5 "$(left 985)" python3 "$HERE/evaluate.py" --config "$CONFIG" --model "$OUT/$1/model" --arm "$1" \
    --workers $WORKERS --deadline "$(at $STOP)" --out "$OUT/$2.eval.jsonl" "${@:3}" > "$OUT/$2.eval.log" 2>&1
}
[ "${ADAPT_UNTIL:-}" = short ] && exit
say arms
now=$(( $(date +%s) - START )) wave=0
for i in "${!ARMS[@]}"; do
  [ -e "$OUT/${ARMS[i]}/run.jsonl" ] && continue
  wave=$(( i / GPUS + 1 ))
  on_free_gpu continued "${ARMS[i]}" $(( START + now + (TOTAL * LAST / 1000 - now) * wave / WAVES ))
done
on_free_gpu evaluated short short --most 10
for run in "${ARMS[@]}"; do on_free_gpu evaluated "$run" "$run"; done
for topk in 32 8; do  # 64 and 40 of the 96 blocks that it was continued with
  (( $(left $STOP) > 40 )) && on_free_gpu evaluated aligned "few-$topk" --lengths 32768 --topk $topk
done
wait
rm -f "$OUT/free"
cat "$OUT"/*.eval.jsonl "$OUT/step.jsonl" "$OUT"/*/run.jsonl > "$OUT/results.jsonl"
cat "$OUT"/*.eval.log | grep -v '^$'
for field in text_loss answer_loss wrong; do
  python3 "$HERE/plot.py" --field $field --out "$OUT/$field.svg" "$OUT"/*/log.jsonl
done
say "done"
