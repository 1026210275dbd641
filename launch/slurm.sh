#!/usr/bin/env bash
#SBATCH --job-name=internvlx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
# One process a GPU. Coordinator and process numbers come from SLURM; the time limit sends SIGTERM 180 s before, the run
# saves and ends with 75, and the job goes back into the queue.
#   sbatch launch/slurm.sh --config configs/hd_finetune.py --set output_dir=/shared/runs/mine
# DRY=1 bash launch/slurm.sh ... prints the command.
set -uo pipefail
command=(srun --kill-on-bad-exit=0 "${PYTHON:-python}" train.py "$@" --coordinator auto --timeout 600)
if [[ -n ${DRY:-} ]]; then
  echo "${command[*]}"
  exit 0
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax}"
"${command[@]}"
status=$?
[[ $status != 75 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
