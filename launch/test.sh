#!/usr/bin/env bash
# bash launch/test.sh [--all] [pytest arguments]
# Installs into .venv if need be, then runs the tests: the fast ones, or with --all every one that runs on this machine.
# Without pytest arguments files run side by side, one for each core up to four; with --all those of vLLM come after,
# alone: launch/vllm_venv.sh makes its environment first (minutes, once). Last come those that are marked `long`, each
# only if it can end within LONG_MINUTES of the start (default 72); the others are named as skipped. With --all
# launch/chromium.sh installs the browser of the report's tests where it can.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh

select=(-m "not slow")
all=
if [ "${1:-}" = --all ]; then
    select=()
    all=yes
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
if [ $# != 0 ]; then
    exec "$python" -m pytest "${select[@]}" "$@"
fi

cores=$(nproc)
side_by_side=$((cores < 4 ? cores : 4))
# A file stays on one process, with its module fixtures, and the files of tests/e2e, the longest, come first.
by_file=(--dist loadfile --no-loadscope-reorder)
if [ -z "$all" ]; then
    exec "$python" -m pytest "${select[@]}" --numprocesses "$side_by_side" "${by_file[@]}"
fi
alone=tests/e2e/test_vllm.py
bash launch/chromium.sh
"$python" -m pytest -m "not long" --numprocesses "$side_by_side" "${by_file[@]}" --ignore "$alone"
"$python" -m pytest "$alone"
export LONG_UNTIL=$(($(date +%s) - SECONDS + 60 * ${LONG_MINUTES:-72}))
exec "$python" -m pytest -m long --numprocesses "$side_by_side" "${by_file[@]}" tests/e2e
