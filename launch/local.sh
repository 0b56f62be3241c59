#!/usr/bin/env bash
# One process that uses every accelerator of this machine, started again whenever it was preempted.
#
#   launch/local.sh run --config=configs/llama2_7b.py:gsm8k --workdir=runs/llama2_7b-gsm8k
#
# Arguments are those of `panacea`. Running it again goes on where the last run stopped and skips
# what is done. SIGTERM or Ctrl-C to this script: the state is saved, then it ends with 75.
set -uo pipefail

stop=0
child=
on_signal() {
  stop=1
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap on_signal TERM INT

while :; do
  # In the background, because bash runs a trap only between commands, but ends a `wait` for it.
  panacea "$@" &
  child=$!
  wait "$child"
  status=$?
  # That wait may have ended for the signal alone; this one is for the state to be saved.
  if [ "$stop" = 1 ] && kill -0 "$child" 2>/dev/null; then
    wait "$child"
    status=$?
  fi
  if [ "$status" != 75 ] || [ "$stop" = 1 ]; then exit "$status"; fi
  echo "launch/local.sh: preempted, starting again" >&2
done
