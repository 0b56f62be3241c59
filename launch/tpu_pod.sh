#!/usr/bin/env bash
# Run on a TPU slice that exists already: copy this commit to all its hosts, install it there once,
# run, start again after preemption.
#
#   launch/tpu_pod.sh NAME ZONE run --config=configs/llama2_7b.py:gsm8k --workdir=/mnt/runs/llama2_7b
#
# A slice of several hosts (v5e-16 and up) gets one process a host. Their --workdir must be one
# folder that all of them see, a Filestore share for instance, mounted beforehand; `panacea` ends with
# 2 if it is not. Put it on a disk that outlives the slice in any case.
#
# Not yet run on a TPU. Needs gcloud with a project set, an ssh-agent that holds its key, and Python
# 3.11 or newer on the hosts. Commit what you want to run, since `git archive` sends HEAD. SIGTERM or
# Ctrl-C to this script: the hosts save and stop, then it ends with 75. A second one does not wait.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE COMMAND [FLAGS …]" >&2
  exit 2
fi
name=$1
zone=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Ends with the code of the first host that failed.
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

addresses=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
  --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)')
hosts=$(printf '%s\n' "$addresses" | grep -c .) || hosts=0
if [ "$hosts" = 0 ]; then
  echo "launch/tpu_pod.sh: $name has no hosts; is it there and ready?" >&2
  exit 2
fi

# The code, over whatever is there: .venv and results are not part of the archive and stay. It goes as
# part of the command, since the standard input of one gcloud cannot serve several hosts.
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:panacea_jax.tar.gz" --zone="$zone" --worker=all
on_all 'mkdir -p panacea_jax && tar -xzf panacea_jax.tar.gz -C panacea_jax'

# Once per pyproject.toml; by its contents, since an archive gives all files the time of the commit.
on_all 'cd panacea_jax
  if sha256sum --check --status .venv/.installed-tpu 2>/dev/null; then exit 0; fi
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
      "$python" -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu]" || exit 1
      sha256sum pyproject.toml > .venv/.installed-tpu
      exit 0
    fi
  done
  echo "no Python 3.11 or newer on this VM; install one first" >&2
  exit 2'

# On one host local.sh starts again; several must do so together, from here. The lock: gcloud repeats
# the command when a connection breaks, while the first one may live on.
command=launch/local.sh
together=
stop="pkill -TERM -f '^bash launch/local.sh'" # the script, not the shells that name it
if [ "$hosts" -gt 1 ]; then
  command=panacea
  together=--coordinator=auto
  stop="pkill -TERM -x panacea"
fi
signals=0
run=
on_signal() {
  signals=$((signals + 1))
  if [ "$signals" = 1 ]; then on_all "$stop" || true; else kill -KILL "$run"; fi
}
trap on_signal TERM INT
arguments=$(printf '%q ' "$@") # keeps every argument whole through ssh
status=75
while [ "$status" = 75 ]; do
  on_all "cd panacea_jax && PATH=\"\$PWD/.venv/bin:\$PATH\" \
    flock --nonblock --conflict-exit-code=2 .venv/.running $command $arguments$together" &
  run=$!
  # A signal to this script ends a `wait`; the next one gives the run's own status.
  while before=$signals; status=0; wait "$run" || status=$?; [ "$signals" != "$before" ]; do :; done
  if [ "$signals" -gt 0 ]; then break; fi
  if [ "$status" = 75 ]; then echo "launch/tpu_pod.sh: preempted, starting again" >&2; fi
done
exit "$status"
