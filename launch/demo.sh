#!/usr/bin/env bash
# bash launch/demo.sh [--section.key VALUE ...]
# Installs into .venv if need be, then trains on the embedded cards task, afresh each time, into runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh

if [ -e runs/demo ]; then
    aside="runs/demo-$(date -r runs/demo +%Y%m%d-%H%M%S)"
    while [ -e "$aside" ]; do aside="$aside-again"; done
    mv runs/demo "$aside"
    echo "the last demo is in $aside now"
fi
exec "$python" -m tokenppo train --config configs/cards.yaml --run.dir runs --run.name demo "$@"
