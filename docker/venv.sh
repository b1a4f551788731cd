#!/usr/bin/env bash
# bash docker/venv.sh LOCK: makes .venv of what a lock names, each file held against its hash. Once it is there, seconds.
set -euo pipefail

python="$PWD/.venv/bin/python"
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --require-hashes)
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
"${pip[@]}" --requirement docker/build.lock
# Without isolation: an isolated build would fetch its tools anew, and those by no hash.
"${pip[@]}" --no-build-isolation --requirement "$1" || {
    echo "$1 could not be installed. It wants just these files; docker/cpu.lock wants torch's build for CPUs, so give pip" \
        "an index that has it (docs/containers.md, Packages)" >&2
    exit 1
}
