#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tools/fuzz.sh FOLDER SECONDS [TARGET...]
#
# Runs the libFuzzer programs *_fuzz of FOLDER (or the named ones), SECONDS each, from the seeds in
# fuzz/corpus. New inputs stay in FOLDER/corpus; an input that fails lands in FOLDER/findings, and
# belongs in fuzz/corpus once mended. Stops at the first finding.
set -euo pipefail
seeds=$(cd "$(dirname "$0")/.." && pwd)/fuzz/corpus
[[ $# -ge 2 ]] || { sed -n 's/^# tools/usage: tools/p' "$0" >&2; exit 1; }
folder=$1 seconds=$2
shift 2
[[ $# -gt 0 ]] || for program in "$folder"/*_fuzz; do set -- "$@" "$(basename "$program" _fuzz)"; done

for target in "$@"; do
  printf '== %s: %s seconds\n' "$target" "$seconds"
  mkdir -p "$folder/corpus/$target" "$folder/findings"
  "$folder/${target}_fuzz" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=2048 \
    -max_len=65536 -print_final_stats=1 -artifact_prefix="$folder/findings/$target-" \
    "$folder/corpus/$target" "$seeds/$target" 2>&1 |
    grep -E '^(stat::|==|SUMMARY|Test unit|artifact)|ERROR|^#[0-9]+.*(pulse|DONE)'
done
