#!/bin/sh
# Runs this pack on a machine with a CUDA driver, and nothing else: device suite, capabilities, costs.
# Usage: OUT=FOLDER ./run.sh     At most 8 minutes; results are appended to FOLDER as they come, a table comes last.
# Exit status: 0 if every step passed, 1 if one failed or ran over its limit, 3 if there is no CUDA device.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-results}
mkdir -p "$out" || exit 1
export FARCALL_CUDA=require
status=0

# step NAME SECONDS FILE COMMAND...
step() {
    name=$1 limit=$2 file=$3
    shift 3
    started=$(date +%s)
    timeout -k 5 "$limit" "$@" >>"$out/$file" 2>&1
    code=$?
    seconds=$(($(date +%s) - started))
    printf '{"subject":"step","what":"%s","exit":%d,"seconds":%d}\n' "$name" "$code" "$seconds" >>"$out/steps.jsonl"
    echo "$name: exit $code after $seconds s"
    [ "$code" -eq 0 ] || status=1
    return "$code"
}

printf '{"subject":"run","what":"%s","commit":"%s"}\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(cat "$here/commit")" >>"$out/steps.jsonl"
step capabilities 30 gpu.jsonl "$here/gpu" capabilities ${QUICK:-}
[ $? -ne 3 ] || { tail -n 1 "$out/gpu.jsonl"; exit 3; }
step suite 180 suite.log "$here/suite"
step driver 30 gpu.jsonl "$here/gpu" driver ${QUICK:-}
step host 30 gpu.jsonl "$here/gpu" host ${QUICK:-}
step latency 60 gpu.jsonl "$here/gpu" latency ${QUICK:-}
step copies 100 gpu.jsonl "$here/gpu" copies ${QUICK:-}
step alloc 40 gpu.jsonl "$here/gpu" alloc ${QUICK:-}
"$here/gpu" table "$out/gpu.jsonl" | tee "$out/table.txt"
tail -n 2 "$out/suite.log"
exit "$status"
