#!/usr/bin/env bash
# Creates .venv beside the package and installs it with the given extras; fast if nothing has changed.
# Usage: source launch/setup.sh EXTRA[,EXTRA...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="$1"
python="$root/.venv/bin/python"
stamp="$root/.venv/.installed-$extras"
if ! "$python" -c "import sys" 2>/dev/null; then
  base="${PYTHON:-python3}"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$base" --version) is too old: set PYTHON to a Python 3.10 or newer" >&2
    exit 2
  }
  echo "making $root/.venv"
  rm -rf "$root/.venv"
  "$base" -m venv "$root/.venv"
fi
# The stamp records the installed requirements and C sources, and is written last.
installs() (
  shopt -s nullglob
  cat "$root/pyproject.toml" "$root"/robust_dist/*/native/*
)
if ! cmp -s "$stamp" <(installs); then
  echo "installing robust_dist[$extras] into .venv (torch alone is some GB; minutes on a fresh machine)"
  "$python" -m pip install --quiet --disable-pip-version-check -e "${root}[$extras]"
  installs > "$stamp"
fi
