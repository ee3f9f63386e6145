#!/usr/bin/env bash
# Makes .venv, installs what the tests need, then runs linter, type checker and the default tests.
# Words after the command go to pytest: bash tests/run.sh -k optim, bash tests/run.sh --slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
