#!/usr/bin/env bash
# bash docker/lock.sh [options of `uv pip compile`]
# Writes docker/*.lock: exact releases with their hashes, one file for each target. What a lock holds already stays, unless
# --upgrade or --upgrade-package NAME is given. Wants uv, and an index or folder that has torch's build for CPUs, as uv is
# told of it: UV_EXTRA_INDEX_URL, UV_FIND_LINKS, or --find-links DIR. No address gets into a lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=2.13.0  # the release that all tests ran with
lock() {  # lock NAME PYTHON CONSTRAINTS INPUT ...
    local name=$1 python=$2 constraints=$3
    shift 3
    "${UV:-uv}" pip compile --quiet --no-header --no-annotate --generate-hashes --no-emit-index-url --no-emit-find-links \
        --python-platform x86_64-unknown-linux-gnu --python-version "$python" --constraint <(echo "$constraints") \
        --output-file "docker/$name.lock" "$@"
}
lock cpu 3.11 "torch==$torch+cpu" pyproject.toml docker/build.in --extra lora --extra server "$@"
# All others have the same releases: those that were tested, and the same on both sides of the wire.
same=$(sed -n 's/^\([a-z0-9-]*==[^ ]*\).*/\1/p' docker/cpu.lock)
lock cuda 3.12 "${same/torch==$torch+cpu/torch==$torch}" pyproject.toml docker/build.in --extra lora --extra server "$@"
lock reward-server 3.11 "$same" docker/reward-server.in docker/build.in "$@"
lock build 3.11 "$same" docker/build.in "$@"
