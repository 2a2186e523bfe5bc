#!/usr/bin/env bash
# Runs a program as a task of srun, with one task for each GPU and without torchrun. launch/slurm.sbatch does this when it is
# submitted with --ntasks-per-node above 1. In a batch script of your own:
#   srun --ntasks-per-node 8 --distribution block --kill-on-bad-exit=1 launch/srun.sh pretrain_qad.py --qad-teacher CKPT ...
# task.py sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from SLURM's variables. Variables:
#   MASTER_ADDR     address of the step's first node; default: its name. With QAD_INTERFACE it must be on that interface.
#   MASTER_PORT     its port; default: 20000 + SLURM_JOB_ID % 10000
#   QAD_INTERFACE   network interface (such as ib0) of several nodes for the store of the ranks, NCCL and gloo. A step on one node
#                   listens on the loopback interface only.
#   QAD_JOB_DIR     directory for stop requests to the job (docs/launching.md)
# On SIGTERM or SIGUSR1 to the tasks (scancel --signal=USR1 JOB), a training job saves after its current step and exits with
# status 0.
set -euo pipefail
if [[ $# -eq 0 ]]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; fi
trap '' TERM USR1  # until the program has its own handlers: they would end it while it loads its models
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/integers.sh
source "$here/integers.sh"
if [[ -z ${SLURM_STEP_ID:-} ]]; then  # a batch script has SLURM_PROCID and SLURM_NTASKS, too
  echo "error: SLURM_STEP_ID: not set, so this is not a task of srun. Start it with srun, or use launch/torchrun.sh." >&2
  exit 2
fi
# For environment.sh: what is special on one node, and with one process on a node.
NNODES=$(integer SLURM_STEP_NUM_NODES "${SLURM_STEP_NUM_NODES:-}" 1)
tasks=$(integer SLURM_STEP_NUM_TASKS "${SLURM_STEP_NUM_TASKS:-}" 1)
[[ $tasks -ne $NNODES ]] || NPROC_PER_NODE=${NPROC_PER_NODE:-1}
# shellcheck source=launch/program.sh
source "$here/program.sh"
exec python "$launch/task.py" "$program" "${@:2}"
