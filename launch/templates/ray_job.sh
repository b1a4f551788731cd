#!/usr/bin/env bash
# One training run as a job of a Ray cluster that is there already.
#
#     RAY_ADDRESS=http://127.0.0.1:8265 RUN_DIR=/shared/runs bash ray_job.sh --run.name first
#
# CONFIG and everything it names must lie in WORKING_DIR, which is sent to the cluster (without what .gitignore names), or
# be there under the same absolute path. tokenppo must be installed on the nodes. RUN_DIR is a folder of the cluster: the
# working folder of a job is deleted. SUBMIT holds further options of `ray job submit`, such as --no-wait.
# Secrets: the cluster's own environment has them (HF_TOKEN, WANDB_API_KEY). On the command line or in a runtime
# environment everybody who may list jobs would read them. The token of the cluster is in RAY_AUTH_TOKEN,
# RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, here and on the nodes.
set -euo pipefail

CONFIG=${CONFIG:-configs/cards.yaml}
WORKING_DIR=${WORKING_DIR:-.}
: "${RAY_ADDRESS:?is the address of the dashboard, such as http://127.0.0.1:8265}"
: "${RUN_DIR:?is a folder of the cluster that outlives the job}"

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
# shellcheck disable=SC2086  # SUBMIT is several words
exec ray job submit --address "$RAY_ADDRESS" --working-dir "$WORKING_DIR" ${SUBMIT:-} -- \
    tokenppo train --config "$CONFIG" --resources.ray_address auto --run.dir "$RUN_DIR" "$@"
