#!/usr/bin/env bash
# cards: made by `tokenppo submit slurm`. Submit it again with sbatch: it goes on where the run was.
# 1 node, each with 8 CPU cores and 1 GPUs
# 1 learner process on the first 1; 2 rollout workers in all
# node 0: learner 0 + workers 0, 1 (0.5 each)
#SBATCH --nodes=1
#SBATCH --job-name=cards
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cards-%j.log
#SBATCH --gpus-per-node=1
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
node=(apptainer exec --nv --bind /shared:/shared /images/tokenppo.sif /venv/bin/python)
node+=(-P -m launch.submit.node --meet "$meet" --nodes 1 --learner-nodes 1)
node+=(--ranks-per-node 1 --gpus 1 --accelerate gpu --)
node+=(--config CHECKOUT/configs/cards.yaml --run.dir /shared/runs)

# Each node's words go into a file of their own; those of the learners are in that of node 0.
srun --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=0 \
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
