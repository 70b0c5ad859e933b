#!/bin/bash
# A training that Slurm may end and requeue as often as it likes:  sbatch docs/slurm.sh --amp --checkpoint_name NAME
#SBATCH --job-name=amp-train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

# Two minutes before the end Slurm sends SIGUSR1 to this script, which passes it on as SIGTERM: the program saves and
# ends. Requeued, the same line goes on where it stood, because of --resume auto. For several GPUs put
# `torchrun --standalone --nproc_per_node=N` in place of `python`; torchrun hands SIGTERM on.
stopped=
trap 'stopped=yes; kill -TERM "$child" 2> /dev/null' USR1

srun python main.py --resume auto "$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2> /dev/null; do  # a trap ends `wait` early
    wait "$child"
    status=$?
done

if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
