#!/usr/bin/env bash
# One machine: one process that drives all its accelerators, or several; started again whenever
# it was preempted.
#
#   launch/local.sh run --config=configs/llama2_7b.py:gsm8k --workdir=runs/llama2_7b-gsm8k
#   launch/local.sh --per_gpu run …          one process for each GPU
#   launch/local.sh --processes=2 run …      this many, for instance on CPUs
#
# The other arguments are those of `panacea`. Running it again goes on where the last run stopped and
# skips what is done. SIGTERM or Ctrl-C to this script: the state is saved, then it ends with 75. A
# second one does not wait for that.
#
# Exit codes of `panacea`, of several processes the worst: 75 (preempted) starts all of them again. 2
# (bad input) and 130 end it. So does anything else, unless something was saved since the last start:
# a failure that comes back at the same place ends it at the second time.
set -uo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
count=1
per_gpu=
case "${1-}" in
  --per_gpu)
    per_gpu=1
    if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
      count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
      count=$(nvidia-smi --list-gpus | grep -c '^GPU')
    fi
    shift
    ;;
  --processes=*)
    count=${1#*=}
    shift
    ;;
esac
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: $count processes: a number from 1 on (--per_gpu counts NVIDIA GPUs)" >&2
  exit 2
fi

signals=0
children=()
on_signal() {
  signals=$((signals + 1))
  if [ "$signals" = 1 ]; then forward TERM; else forward KILL; fi
}
forward() {
  for child in "${children[@]}"; do kill -"$1" "$child" 2>/dev/null; done
}
trap on_signal TERM INT

start() {
  children=()
  if [ "$count" = 1 ]; then
    panacea "$@" &
    children=($!)
  else
    # Below the ports that the system gives to outgoing connections; another one each time.
    local port i
    while port=$((20000 + RANDOM % 12000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    for ((i = 0; i < count; i++)); do
      if [ -n "$per_gpu" ]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
      panacea "$@" --coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$i" &
      children+=($!)
    done
  fi
  if [ "$signals" -gt 0 ]; then forward TERM; fi
}

# Sets `status` when all have ended. They end each other, so none is waited for in vain.
finish() {
  local child code before
  status=0
  for child in "${children[@]}"; do
    # A signal to this script ends a `wait`; the next one gives the child's own status.
    while before=$signals; wait "$child"; code=$?; [ "$signals" != "$before" ]; do :; done
    case "$code" in
      0) ;;
      75 | 143) if [ "$status" = 0 ]; then status=75; fi ;; # 143: SIGTERM with nothing to save
      2) status=2 ;;
      *) if [ "$status" != 2 ]; then status=$code; fi ;;
    esac
  done
}

while :; do
  saved=$("$here/saved.sh" "$@")
  start "$@"
  finish
  if [ "$signals" -gt 0 ]; then exit "$status"; fi
  case "$status" in
    75) why=preempted ;;
    0 | 2 | 130) exit "$status" ;;
    *)
      if [ "$("$here/saved.sh" "$@")" = "$saved" ]; then exit "$status"; fi
      why="failed ($status), but with more saved than before"
      ;;
  esac
  echo "launch/local.sh: $why; starting again" >&2
done
