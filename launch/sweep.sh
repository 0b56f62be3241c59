#!/usr/bin/env bash
# One of many runs that stand in a file, a line each: a name, then the flags of `panacea run`.
#
#   # runs.txt; lines like this one and empty ones do not count
#   rho1   --config=configs/llama2_7b.py:gsm8k --config.defence.rho=1
#   rho2   --config=configs/llama2_7b.py:gsm8k --config.defence.rho=2
#
#   launch/sweep.sh runs.txt                     checks the file and prints how many runs there are
#   launch/sweep.sh runs.txt runs/sweep 2        the second of them, into runs/sweep/rho2
#
# No shell reads a line: no spaces inside a flag, no quotes around a value. The run is started by
# launch/local.sh, or by the command in LAUNCH (`LAUNCH=echo` prints its arguments).
set -uo pipefail

fail() {
  echo "launch/sweep.sh: $1" >&2
  exit 2
}
file=${1-}
if [ ! -r "$file" ]; then fail "FILE [RESULTS NUMBER]: cannot read ${file:-a file that is not named}"; fi
mapfile -t runs < <(grep -vE '^[[:space:]]*(#|$)' "$file")

names=()
for run in "${runs[@]}"; do
  read -r name flags <<<"$run"
  names+=("$name")
  if ! [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._=+-]*$ ]]; then fail "$file: $name: not a name for a folder"; fi
  if [[ " $flags" == *" --workdir"* ]]; then fail "$file: $name: --workdir is RESULTS/$name"; fi
done
twice=$(printf '%s\n' "${names[@]}" | sort | uniq -d | head -n 1)
if [ -n "$twice" ]; then fail "$file: $twice: two runs of that name"; fi
if [ "$#" = 1 ]; then
  echo "${#runs[@]}"
  exit
fi

number=${3-}
if ! [[ $number =~ ^[1-9][0-9]*$ ]] || [ "$number" -gt "${#runs[@]}" ]; then
  fail "run ${number:-''}: $file has 1 … ${#runs[@]}"
fi
read -ra words <<<"${runs[number - 1]}"
read -ra launch <<<"${LAUNCH:-$(dirname "${BASH_SOURCE[0]}")/local.sh}"
exec "${launch[@]}" run "${words[@]:1}" --workdir="$2/${words[0]}"
