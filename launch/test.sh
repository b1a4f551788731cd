#!/usr/bin/env bash
# bash launch/test.sh [--all] [pytest arguments]
# Installs into .venv if need be, then runs the tests: the fast ones, or with --all every one that runs on this machine.
# Without pytest arguments files run side by side, one for each core up to four; with --all those of vLLM come after,
# alone: launch/vllm_venv.sh makes its environment first (minutes, once). With --all launch/chromium.sh installs the
# browser of the report's tests where it can.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh

select=(-m "not slow")
alone=tests/e2e/test_vllm.py
after=
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
if [ $# = 0 ]; then
    if [ ${#select[@]} = 0 ]; then
        after=$alone
        bash launch/chromium.sh
    fi
    # A file stays on one process, with its module fixtures, and the files of tests/e2e, the longest, come first.
    cores=$(nproc)
    set -- --numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder --ignore "$alone"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "${select[@]}" "$@"
if [ -n "$after" ]; then
    exec "$python" -m pytest "$after"
fi
