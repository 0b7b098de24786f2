#!/bin/bash
# Pre-train on several hosts:  sbatch --nodes 4 examples/slurm.sh
# Text and runs lie on a file system that all hosts see.
#SBATCH --job-name=switchlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=switchlm-%j.log
#SBATCH --signal=TERM@300
set -euo pipefail

GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# How long torchrun leaves its processes after SIGTERM, to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / GPUS))

# --kill-on-bad-exit=0: torchrun of the other hosts starts its processes anew.
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    -m switchlm pretrain --preset switch-base-64 --data data/text --out runs/base-64 \
    --set training.precision=bfloat16 --set training.checkpoint_every=500 \
    --set mesh.expert="$GPUS" --set mesh.timeout=600
