#!/usr/bin/env bash
# cards: made by `tokenppo submit slurm`. Submit it again with sbatch: it goes on where the run was.
# 3 nodes, each with 32 CPU cores and 4 GPUs
# 8 learner processes on the first 2; 4 rollout workers in all
# node 0: learner 0 | learner 1 | learner 2 | learner 3
# node 1: learner 4 | learner 5 | learner 6 | learner 7
# node 2: worker 0 | worker 1 | worker 2 | worker 3
#SBATCH --nodes=3
#SBATCH --job-name=cards
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cards-%j.log
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
set -euo pipefail

run=/shared/runs/cards
meet=/shared/runs/.meet/slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
ending=

# USR1 comes to this script alone, 300 s before the end: the run saves after the step that it is in.
pause() {
    ending=1
    mkdir -p "$run" && touch "$run/pause"
}
trap pause USR1
rm -f -- "$run/pause" # of a start before this one, which had no time for it

mkdir -p "$meet" && chmod 700 "$meet"
node=(/venv/bin/python)
node+=(-P -m launch.submit.node --meet "$meet" --nodes 3 --learner-nodes 2)
node+=(--ranks-per-node 4 --gpus 4 --accelerate zero3 --)
node+=(--config CHECKOUT/configs/cards.yaml --rollout.workers 4 --rollout.placement apart --rollout.gpus_per_worker 1 --run.dir /shared/runs)

# Each node's words go into a file of their own; those of the learners are in that of node 0.
srun --ntasks-per-node=1 --cpus-per-task=32 --kill-on-bad-exit=0 \
    --output=cards-%j-node%n.log --open-mode=append "${node[@]}" &
step=$!
while true; do # a signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2> /dev/null || break
done

case $code in
    0 | 8) rm -rf -- "$meet" ;;
    *) echo "cards: ended with $code; what Ray logged is in $meet" ;;
esac
if [ "$code" = 8 ] && [ -n "$ending" ]; then
    echo "cards: saved before the time limit; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
