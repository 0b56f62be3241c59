#!/usr/bin/env bash
# What the run with these arguments has saved so far: its checkpoints, and how many answers and
# verdicts. The other scripts compare it before and after a try, to see whether there was progress.
#
#   launch/saved.sh run --config=… --workdir=runs/llama2_7b-gsm8k
set -uo pipefail

workdir=
while [ "$#" -gt 0 ]; do
  case "$1" in
    --workdir=*) workdir=${1#*=} ;;
    --workdir) workdir=${2-} ;;
  esac
  shift
done
if [ ! -d "$workdir" ]; then exit 0; fi
# A checkpoint that is still being written has more than a number for its name.
find "$workdir" -regex '.*/checkpoints/[0-9]+' -prune -print -o \
  -regex '.*/\(generations\|judgements\)/.*\.jsonl' -exec wc -l {} \; | sort
