#!/usr/bin/env bash
# Train on several machines under Slurm; the job requeues itself before its time is up, and goes on where it was.
#   sbatch scripts/finetune_slurm.sh configs/cogvideox_5b.yaml configs/sft.yaml args.train_data=FOLDER
#   sbatch --array=0-3 scripts/finetune_slurm.sh ... args.experiment_name=seed%a args.seed=%a
# Submit it from the project's folder; %a in a word becomes the number of the array's task. docs/parallelism.md says more.
#SBATCH --job-name=cogvideox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # another one for each job, and for each task of an array
export MASTER_ADDR MASTER_PORT NNODES=$SLURM_NNODES
NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
threads=$((${SLURM_CPUS_PER_TASK:?give sbatch --cpus-per-task} / NPROC_PER_NODE))
export NPROC_PER_NODE OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds to save in, when the time is up

# One task of an array has the number of the whole array as its own, by which Slurm would signal and requeue them all.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}

go_on_later() {  # a quarter of an hour before the end, see --signal
    scancel --signal=TERM "$job"  # the ranks finish their step and save; not this script
    wait "$training" || true
    scontrol requeue "$job"
    exit
}
trap go_on_later USR1

# shellcheck disable=SC2016  # SLURM_NODEID is that of each machine
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash finetune_multi_gpus.sh "$@"' launcher "${@//%a/${SLURM_ARRAY_TASK_ID:-0}}" &
training=$!
wait "$training"
