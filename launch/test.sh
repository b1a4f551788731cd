#!/usr/bin/env bash
# bash launch/test.sh [--all] [pytest arguments]
# Installs into .venv if need be, then runs the tests: the fast ones, or with --all every one that runs on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh

select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "${select[@]}" "$@"
