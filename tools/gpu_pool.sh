# SPDX-License-Identifier: Apache-2.0
#
# For scripts that run many programs on one GPU: as many at a time as there are processors, and then
# a line each. Sets $root, the checkout, and $logs, a folder that goes when the script ends.
#
#   source "$(dirname "$0")/gpu_pool.sh"
#   start NAME COMMAND...     in the background, as soon as fewer than JOBS (16) run
#   start_shards NAME COUNT PROGRAM_WITH_GOOGLETEST...
#   finish                    waits, reports; fails if one of them failed, or if there was none
#
# JOBS programs run at a time (default: one a processor; each takes up to 1.5 GB of the GPU's memory),
# and after LIMIT seconds (900) one counts as failed. Golden files are found beside this script, so
# that a folder of programs can be carried to another machine.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
jobs=${JOBS:-$(nproc)}
export INFLLM_SOURCE_DIR=$root
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

start() {
  local name=$1
  shift
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
  {
    local begin=$SECONDS
    timeout "${LIMIT:-900}" "$@" >"$logs/$name" 2>&1
    echo "$? $((SECONDS - begin))" >"$logs/$name.end"
  } &
}

start_shards() {
  local name=$1 count=$2 i
  shift 2
  for ((i = 0; i < count; ++i)); do
    GTEST_TOTAL_SHARDS=$count GTEST_SHARD_INDEX=$i start "$name.$i" "$@"
  done
}

# Of what failed, the end of its output too.
finish() {
  local end name status seconds result failed=0 ran=0
  wait
  for end in "$logs"/*.end; do
    [[ -e "$end" ]] || break
    name=$(basename "$end" .end) result=ok ran=$((ran + 1))
    read -r status seconds <"$end"
    if ((status != 0)); then
      result=FAILED failed=1
      tail -n 40 "$logs/$name" | sed 's/^/    /'
    fi
    printf '%-7s %-32s %4d s\n' "$result" "$name" "$seconds"
  done
  ((ran > 0)) || printf 'found no program to run\n' >&2
  return $((failed || ran == 0))
}
