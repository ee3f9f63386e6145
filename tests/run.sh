#!/usr/bin/env bash
# Makes .venv, installs what the tests need, then runs linter, type checker and the default tests.
# Words after the command go to pytest, which else runs all default tests; these, and a folder's, two files at a time:
# bash tests/run.sh tests/optim, bash tests/run.sh -k optim, bash tests/run.sh --slow
# With --gpu it runs the tests marked gpu alone, GPU_TEST_PROCESSES (4) at a time and for GPU_TEST_SECONDS (900) at most.
# With --multinode it also installs what two hosts on one machine need (Debian, as root), and runs their tests.
set -euo pipefail
cd "$(dirname "$0")/.."

multinode_tools() {
  local missing=() tool
  for tool in ip:iproute2 tc:iproute2 faketime:faketime; do
    command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
  done
  if [ "$(id -u)" != 0 ]; then
    echo "error: --multinode makes network namespaces, which needs root" >&2
    exit 2
  elif [ ${#missing[@]} -gt 0 ] && ! command -v apt-get >/dev/null; then
    echo "error: --multinode needs ${missing[*]}: install what your system calls so" >&2
    exit 2
  elif [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
  fi
}

words=() gpu=
for word in "$@"; do
  [ "$word" != --multinode ] || multinode_tools
  if [ "$word" = --gpu ]; then gpu=yes; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
source launch/setup.sh test
if [ -n "$gpu" ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: --gpu needs a GPU that torch sees; robust-dist doctor says what it finds" >&2
    exit 2
  }
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
  exec timeout --signal=INT "${GPU_TEST_SECONDS:-900}" "$python" -m pytest -m gpu -n "${GPU_TEST_PROCESSES:-4}" \
    --dist loadfile --timeout 300 "$@"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
at_a_time=$([ $# -gt 0 ] || echo two)
for word in "$@"; do
  [ ! -d "$word" ] || at_a_time=${at_a_time:-two}
  case $word in -n* | --numprocesses* | -s | --pdb) at_a_time=as_said ;; esac
done
[ "$at_a_time" != two ] || set -- -n 2 --dist loadfile --no-loadscope-reorder "$@"
exec "$python" -m pytest "$@"
