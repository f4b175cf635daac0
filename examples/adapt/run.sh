#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The whole experiment within a given time: pretraining on all GPUs, then every arm on one of its own,
# then all evaluations side by side. Ends in time and leaves what there is.
#
#   examples/adapt/run.sh OUT SECONDS [CONFIG]
#
# needs .train/adapt/text and .train/adapt/tokenizer (text.py, tokenizer.py) and `import infllm`.
# OUT gets results.jsonl, the logs, and one folder a run with its checkpoint and state.
set -u
OUT=$1 SECONDS_IN_ALL=$2
HERE=$(dirname "$0") CONFIG=${3:-$(dirname "$0")/configs/h200.toml}
START=$(date +%s)
GPUS=$(nvidia-smi -L | wc -l)
WORKERS=$(( $(nproc) / GPUS - 1 ))
at() { echo $(( START + SECONDS_IN_ALL * $1 / 1000 )); }  # the time at so many thousandths
say() { echo "== $(( $(date +%s) - START )) s: $*"; }
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor} OMP_NUM_THREADS=1
mkdir -p "$OUT"

if [ ! -e .train/adapt/data/words.txt ]; then
  python3 "$HERE/documents.py" --processes "$(nproc)" || exit 1
fi
say "pretraining on $GPUS GPUs"
torchrun --nproc-per-node "$GPUS" "$HERE/train.py" --config "$CONFIG" --phase pretrain --out "$OUT/short" \
  --workers $WORKERS --deadline "$(at 390)" > "$OUT/short.log" 2>&1
tail -n 2 "$OUT/short.log"

evaluate() {  # GPU, checkpoint, name of the arm, thousandths, name of the log, more options
  CUDA_VISIBLE_DEVICES=$1 timeout -k 5 $(( $(at 985) - $(date +%s) )) python3 "$HERE/evaluate.py" \
    --config "$CONFIG" --model "$2/model" --arm "$3" --workers $WORKERS --deadline "$(at "$4")" \
    --out "$OUT/results.jsonl" "${@:6}" > "$OUT/$5.eval.log" 2>&1
}

say arms
gpu=0
for arm in dense sparse aligned; do
  CUDA_VISIBLE_DEVICES=$(( gpu % GPUS )) python3 "$HERE/train.py" --config "$CONFIG" --phase adapt --arm $arm \
    --init "$OUT/short/model" --out "$OUT/$arm" --workers $WORKERS --deadline "$(at 770)" > "$OUT/$arm.log" 2>&1 &
  gpu=$(( gpu + 1 ))
done
# Meanwhile on the last GPU: the model that is not continued, and a training step's time.
(
  evaluate $(( GPUS - 1 )) "$OUT/short" short 620 short
  CUDA_VISIBLE_DEVICES=$(( GPUS - 1 )) timeout -k 5 $(( $(at 770) - $(date +%s) )) python3 "$HERE/bench_step.py" \
    --config "$CONFIG" --lengths 4096 32768 --out "$OUT/results.jsonl" > "$OUT/step.log" 2>&1
) &
wait
tail -qn 1 "$OUT"/{dense,sparse,aligned}.log "$OUT/short.eval.log"

say evaluation
gpu=0
for arm in dense sparse aligned; do
  evaluate $(( gpu % GPUS )) "$OUT/$arm" $arm 940 $arm &
  gpu=$(( gpu + 1 ))
done
if (( GPUS > 3 )); then  # 64 and 40 of the 96 blocks that it was continued with
  for topk in 32 8; do evaluate 3 "$OUT/aligned" aligned 940 "few-$topk" --lengths 32768 --topk $topk; done &
fi
wait
cat "$OUT"/*/run.jsonl >> "$OUT/results.jsonl"
cat "$OUT"/*.eval.log | grep -v '^$'
python3 "$HERE/plot.py" --out "$OUT/loss.svg" "$OUT"/{short,dense,sparse,aligned}/log.jsonl
python3 "$HERE/plot.py" --field answer_loss --out "$OUT/answers.svg" "$OUT"/{short,dense,sparse,aligned}/log.jsonl
say "done"
