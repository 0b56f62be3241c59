#!/usr/bin/env bash
# Run on a TPU VM that exists already: copy this commit there, install it once, run, start again
# after preemption.
#
#   launch/tpu_pod.sh NAME ZONE run --config=configs/llama2_7b.py:gsm8k --workdir=/mnt/runs/llama2_7b
#
# Single-host slices only (v5e-8, v6e-8, v4-8, …). A slice of several hosts needs one process a host
# with --coordinator=auto (docs/processes.md) and a work directory that all of them see, which this
# script does not arrange: it refuses such a slice.
#
# Not yet run on a TPU. Needs gcloud with a project set, and Python 3.11 or newer on the VM. The work
# directory lies on the VM, so put it on a disk that outlives it; commit what you want to run, since
# `git archive` sends HEAD.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE COMMAND [FLAGS …]" >&2
  exit 2
fi
name=$1
zone=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

addresses=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
  --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)')
workers=$(printf '%s\n' "$addresses" | grep -c .) || workers=0
if [ "$workers" != 1 ]; then
  echo "launch/tpu_pod.sh: $name has $workers hosts; only slices of one host are supported so far" >&2
  exit 2
fi

# The code, over whatever is there: .venv and results are not part of the archive and stay.
git archive --format=tar HEAD | on_all 'mkdir -p panacea_jax && tar -xf - -C panacea_jax'

# Once per pyproject.toml.
on_all 'cd panacea_jax
  if [ .venv/.installed-tpu -nt pyproject.toml ]; then exit 0; fi
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
      "$python" -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu]" || exit 1
      touch .venv/.installed-tpu
      exit 0
    fi
  done
  echo "no Python 3.11 or newer on this VM; install one first" >&2
  exit 2'

# local.sh starts again on 75. The quoting keeps every argument whole through ssh.
arguments=$(printf '%q ' "$@")
on_all "cd panacea_jax && PATH=\"\$PWD/.venv/bin:\$PATH\" launch/local.sh $arguments"
