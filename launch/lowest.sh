#!/usr/bin/env bash
# bash launch/lowest.sh [pytest arguments]
# Makes an environment with the lowest releases that pyproject.toml allows, in FOLDER (~/.cache/tokenppo/lowest), anew each
# time, and runs the tests in it that a release could break: those of the core, and a training whose rewards come over HTTP.
# torch is that of docker/cpu.lock: older builds for CPUs are not to be had everywhere. Wants uv, which is told where
# packages are by its own variables (UV_FIND_LINKS, UV_EXTRA_INDEX_URL).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=${UV:-uv}
folder=${FOLDER:-$HOME/.cache/tokenppo/lowest}
python=$folder/venv/bin/python
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' docker/cpu.lock)
mkdir -p "$folder"
"$uv" venv --quiet --clear --python "${PYTHON:-python3}" "$folder/venv"
extras=(--extra lora --extra server --extra tune --extra workspaces)
"$uv" pip compile --quiet --no-header --no-annotate --resolution lowest-direct --constraint <(echo "$torch") \
    --python "$python" --output-file "$folder/lowest.txt" pyproject.toml "${extras[@]}"
# The tools of the tests are nobody's dependency: the newest that go with the rest.
"$uv" pip install --quiet --python "$python" --requirement "$folder/lowest.txt" pytest pytest-timeout hypothesis schemathesis
"$uv" pip install --quiet --python "$python" --no-deps --editable .
export PATH="$folder/venv/bin:$PATH" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
if [ $# = 0 ]; then
    for name in config verbs ppo learner model engine lora prompt_data weights wire components reward_server checkpoint \
        export report ledger trackers evaluate wandb_view; do
        set -- "$@" "tests/test_$name.py"
    done
    set -- -m "not slow" "$@"
    "$python" -m pytest -q tests/e2e/test_reward_http.py
fi
exec "$python" -m pytest -q "$@"
