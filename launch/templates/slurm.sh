#!/usr/bin/env bash
# One training run on one node of a SLURM cluster. Copy it, mend what is at the top, and from the checkout say
#
#     sbatch --gpus=8 slurm.sh --optim.lr 1e-6        # options of sbatch before the script, of the run behind it
#
# without GPUs: ACCELERATE_CONFIG=launch/accelerate/cpu.yaml sbatch --gpus=0 slurm.sh
# CONFIG, RUN_NAME, ACCELERATE_CONFIG, LEARNERS and VENV may also come from the environment: CONFIG=my.yaml sbatch slurm.sh.
# The default name of the run is that of the job, which stays when the job is requeued (a lost node, a preemption), so
# the same command goes on where it was. After the time limit submit it again with the RUN_NAME that it had.
# TERM comes 120 s before the end, for the run to close its files.
#SBATCH --job-name=tokenppo
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

CONFIG=${CONFIG:-configs/cards.yaml}
RUN_NAME=${RUN_NAME:-slurm-$SLURM_JOB_ID}
LEARNERS=${LEARNERS:-${SLURM_GPUS_ON_NODE:-1}} # one learner rank for each GPU
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-launch/accelerate/ddp.yaml}
VENV=${VENV:-.venv}

cores=${SLURM_CPUS_PER_TASK:-1}
for file in "$CONFIG" "$ACCELERATE_CONFIG" "$VENV/bin/accelerate"; do
    [ -e "$file" ] || {
        echo "slurm.sh: there is no $file in $PWD; set CONFIG, ACCELERATE_CONFIG or VENV, or submit from elsewhere" >&2
        exit 2
    }
done
VENV=$(cd "$VENV" && pwd)
export PATH="$VENV/bin:$PATH" OMP_WAIT_POLICY=PASSIVE
# srun has not taken over --cpus-per-task of the job by itself since 22.05. TERM reaches every process of the step at once:
# accelerate must outlive the learner, since SLURM kills what is left when it ends. The learner sets a handler of its own.
exec srun --ntasks=1 --cpus-per-task="$cores" --kill-on-bad-exit=1 \
    bash -c 'trap "" TERM; exec "$@"' learners accelerate launch --config_file "$ACCELERATE_CONFIG" --num_processes "$LEARNERS" \
    --num_cpu_threads_per_process "$((cores > LEARNERS ? cores / LEARNERS : 1))" \
    -m launch.train --config "$CONFIG" --run.name "$RUN_NAME" "$@"
