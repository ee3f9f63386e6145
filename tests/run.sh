#!/usr/bin/env bash
# Makes .venv, installs what the tests need, then runs linter, type checker and the default tests.
# Words after the command go to pytest, which else runs all default tests; these, and a folder's, two files at a time:
# bash tests/run.sh tests/optim, bash tests/run.sh -k optim, bash tests/run.sh --slow
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

for word in "$@"; do
  [ "$word" != --multinode ] || multinode_tools
done
source launch/setup.sh test
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
