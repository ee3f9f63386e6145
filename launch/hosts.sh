#!/usr/bin/env bash
# One job on hosts reachable by plain ssh: one launcher per host, all output here, prefixed with the host's name.
#   bash launch/hosts.sh host1,host2 --config configs/recipes/R.yaml --run_dir /shared/runs/r1
# The hosts need this folder (same path, commit and package versions) and a shared file system for the run and the data.
# When one host's part fails, or this script exits for any reason, all parts end; the exit status is the first bad one.
# Variables: ENGINE (a configs/accelerate/multinode_*.yaml: ddp, fsdp2, hsdp, zero2, zero3), GPUS_PER_NODE, MASTER_ADDR,
# MASTER_PORT, JOIN_SECONDS, RESTARTS (launch/NODES.md); RETRIES: restarts after failures that are not user errors;
# REMOTE_DIR, REMOTE_PYTHON: the repository and its Python on the hosts; SSH: the ssh command; and the variables
# listed in PASS ("NCCL_SOCKET_IFNAME NCCL_DEBUG"), which are set on every host.
set -euo pipefail
usage() { sed -n '2,4p' "${BASH_SOURCE[0]}" >&2; }
if [ $# -lt 2 ] || [ "${1:0:1}" = - ]; then usage; exit 2; fi
if ! ((BASH_VERSINFO[0] > 5 || (BASH_VERSINFO[0] == 5 && BASH_VERSINFO[1] >= 1))); then
  echo "error: bash $BASH_VERSION is too old: hosts.sh needs 5.1" >&2; exit 2
fi
IFS=, read -r -a hosts <<<"$1"
for host in "${hosts[@]}"; do
  [ -n "$host" ] || { echo "error: an empty name among the hosts $1" >&2; exit 2; }
done
shift
folder="${REMOTE_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
python="${REMOTE_PYTHON:-$folder/.venv/bin/python}"
read -r -a ssh <<<"${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
work="$(mktemp -d)"
# Every host's part reads from this pipe and ends when it closes: with this script, or when `hold` is closed.
mkfifo "$work/hold"

# Words as one string that a remote shell splits again.
quoted() { printf '%q ' "$@"; }

fail() { echo "error: $*" >&2; exit 2; }

probe_all() {
  local host place=0 pids=()
  for host in "${hosts[@]}"; do
    "${ssh[@]}" "$host" "cd $(quoted "$folder") && exec $(quoted "$python" launch/node.py probe "$address")" \
      </dev/null >"$work/probe.$place" 2>"$work/probe-errors.$place" &
    pids+=($!)
    place=$((place + 1))
  done
  for place in "${!hosts[@]}"; do
    wait "${pids[$place]}" || fail "${hosts[$place]} cannot take part: $(tail -n 3 "$work/probe-errors.$place")"
    # A host's login scripts may print too.
    sed -n 's/^probe //p' "$work/probe.$place" >"$work/answer.$place"
    [ -s "$work/answer.$place" ] || fail "${hosts[$place]} gave no answer: $(tail -n 3 "$work/probe.$place")"
    grep -q '"resolves": true' "$work/answer.$place" ||
      fail "${hosts[$place]} does not know the name $address: set MASTER_ADDR to an address of the first host"
  done
}

# The part of a probe's JSON line that must be equal on all hosts, or its port.
alike() { sed -E 's/.*"alike": (\{[^}]*\}).*/\1/' "$work/answer.$1"; }
port() { sed -E 's/.*"port": ([0-9]+).*/\1/' "$work/answer.$1"; }

check_alike() {
  local place different=0
  for place in "${!hosts[@]}"; do [ "$(alike "$place")" = "$(alike 0)" ] || different=1; done
  [ $different = 0 ] && return
  for place in "${!hosts[@]}"; do echo "${hosts[$place]}: $(alike "$place")" >&2; done
  fail "the hosts differ: bring them to the same commit, Python, packages and GPUs"
}

start_all() {
  local place name words
  pids=()
  for place in "${!hosts[@]}"; do
    words=("NODES=${#hosts[@]}" "NODE_RANK=$place" "MASTER_ADDR=$address" "MASTER_PORT=$port" END_WITH_INPUT=1)
    words+=("GRACE_SECONDS=${GRACE_SECONDS:-30}" PYTHONUNBUFFERED=1)
    for name in ENGINE GPUS_PER_NODE JOIN_SECONDS RESTARTS OMP_NUM_THREADS ${PASS:-}; do
      [ -z "${!name+x}" ] || words+=("$name=${!name}")
    done
    "${ssh[@]}" "${hosts[$place]}" "cd $(quoted "$folder") && exec $(quoted env "${words[@]}" "$python" launch/node.py "$@")" \
      <"$work/hold" > >(exec {hold}>&-; exec sed -u "s|^|[${hosts[$place]}] |") 2>&1 {hold}>&- &
    pids+=($!)
  done
}

# Wait for all; the first bad status ends the others.
wait_all() {
  local code done_pid place
  status=0
  while [ ${#pids[@]} -gt 0 ]; do
    code=0
    wait -n -p done_pid "${pids[@]}" || code=$?
    # No part ended: a trapped signal interrupted the wait.
    [ -n "${done_pid:-}" ] || continue
    for place in "${!pids[@]}"; do
      [ "${pids[$place]}" != "$done_pid" ] || break
    done
    unset "pids[$place]"
    [ $code != 0 ] || continue
    if [ $status = 0 ]; then
      status=$code
      echo "${hosts[$place]} ended with status $code; ending the others" >&2
    fi
    close_hold
  done
}

close_hold() { [ -z "$hold" ] || { exec {hold}>&-; hold=""; }; }

run_once() {
  # Opened for reading and writing, so that it does not wait for a reader; readers see its end once this one closes.
  exec {hold}<>"$work/hold"
  port="${MASTER_PORT:-$(port 0)}"
  start_all "$@"
  wait_all
  close_hold
}

hold="" stopped=0 pids=()
trap 'close_hold; wait || true; rm -rf "$work"' EXIT
trap 'stopped=130; echo "stopping all hosts" >&2; close_hold' INT TERM HUP
address="${MASTER_ADDR:-${hosts[0]##*@}}"
probe_all
check_alike
echo "${#hosts[@]} hosts, alike: $(alike 0)"
case "${RETRIES:-0}" in *[!0-9]*) fail "RETRIES=$RETRIES is not valid: it must be a whole number" ;; esac
retries="${RETRIES:-0}"
while :; do
  run_once "$@"
  [ "$stopped" = 0 ] || exit "$stopped"
  # 2 is a user error, 3 a loss that is no longer finite, 75 a requested stop.
  case $status in 0 | 2 | 3 | 75) exit "$status" ;; esac
  [ "$retries" -gt 0 ] || exit "$status"
  retries=$((retries - 1))
  echo "starting all hosts again" >&2
  probe_all
done
