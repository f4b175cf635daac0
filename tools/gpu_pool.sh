# SPDX-License-Identifier: Apache-2.0
#
# For scripts that run many programs on one GPU: as many at a time as there are processors, and a
# line each. Sets $root, the checkout, and $logs, a folder that goes when the script ends.
#
#   source "$(dirname "$0")/gpu_pool.sh"
#   ended() { ... }           if defined: called with NAME SECONDS RESULT (ok or FAILED) when one has
#                             ended; its output is in $logs/NAME
#   start NAME COMMAND...     in the background, as soon as fewer than JOBS run; says how it ended
#   start_shards NAME COUNT PROGRAM_WITH_GOOGLETEST...
#   finish                    waits; fails if one of them failed, or if there was none
#
# JOBS programs run at a time (default: one a processor; each takes up to 1.5 GB of the GPU's memory),
# and after LIMIT seconds (900) one counts as failed. Golden files are found beside this script, so
# that a folder of programs can be carried to another machine.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
jobs=${JOBS:-$(nproc)}
export INFLLM_SOURCE_DIR=$root
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# Of what fails, the end of its output too.
start() {
  local name=$1
  shift
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
  {
    local begin=$SECONDS result=ok text=
    timeout "${LIMIT:-900}" "$@" >"$logs/$name" 2>&1 || {
      result=FAILED
      text=$(tail -n 40 "$logs/$name" | sed 's/^/    /'; printf ':')
    }
    printf '%s%-7s %-32s %4d s\n' "${text%:}" "$result" "$name" $((SECONDS - begin))
    ! declare -F ended >/dev/null || ended "$name" $((SECONDS - begin)) "$result"
    echo "$result" >"$logs/$name.end"
  } &
}

start_shards() {
  local name=$1 count=$2 i
  shift 2
  for ((i = 0; i < count; ++i)); do
    GTEST_TOTAL_SHARDS=$count GTEST_SHARD_INDEX=$i start "$name.$i" "$@"
  done
}

finish() {
  wait
  local ends
  ends=$(cat "$logs"/*.end 2>/dev/null)
  [[ -n "$ends" ]] || printf 'found no program to run\n' >&2
  [[ -n "$ends" && "$ends" != *FAILED* ]]
}
