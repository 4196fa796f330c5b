#!/usr/bin/env bash
# Slurm: sbatch --nodes 4 examples/slurm.sh; after a time limit or a failure it is queued again, up to
# ten times, and goes on from its last checkpoint.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --signal=TERM@120  # two minutes before the limit: a checkpoint is saved
#SBATCH --open-mode=append

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # torch 2.13: else restarts find ranks that are gone
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
folder=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID  # the number stays when it is queued again
# srun does not hand on --cpus-per-task; torchrun gives workers 30 seconds after TERM if not told.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --shutdown-timeout 100 \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m gradaccum train \
  --model_name_or_path ./model --dataset_name pairs.jsonl --effective_batch_size 512 \
  --output_dir "$folder" --resume_from_checkpoint auto --save_steps 200 ||
  { [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] && scontrol requeue "$SLURM_JOB_ID"; }
