#!/bin/bash
# Pretraining on two nodes with four GPUs each; --nodes=1 is enough for one. Submit with: sbatch docs/slurm.sh
# Two minutes before the time limit Slurm sends SIGTERM: the run saves and exits, and this script submits itself again.
#SBATCH --job-name=crossnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=crossnet-%j.log

set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
log=checkpoints/crossnet/run.log
started=$(mktemp)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90  # seconds that torchrun leaves for saving; its default is 30

# One torchrun per node, which starts one process per GPU: 8 processes of 8 objects, a global batch of 64.
# Since Slurm 22.05 srun does not inherit --cpus-per-task: without it, all four processes would share one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node=4 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first_node:29500" \
    train_crossnet_con.py --data_root data --exp_name crossnet --batch_size 8 --workers 7 --resume
code=$?

# Submit again only after SIGTERM: not when the run is finished, has failed, or ended before it wrote its log.
if [ "$code" -ne 0 ] && [ "$log" -nt "$started" ] && tail -n 1 "$log" | grep -q "stopped by SIGTERM"; then
    sbatch docs/slurm.sh
fi
rm -f "$started"
exit "$code"
