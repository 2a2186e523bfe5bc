#!/usr/bin/env bash
# Starts a program on all GPUs of this node, on a single node or as one of several:
#   launch/torchrun.sh pretrain_qad.py --qad-teacher CKPT ...
#   NNODES=4 NODE_RANK=2 MASTER_ADDR=10.0.0.1 launch/torchrun.sh pretrain_qad.py ...     # the same on each node, NODE_RANK 0 to 3
# Variables:
#   NPROC_PER_NODE  number of processes on this node; default: its number of GPUs, or 1
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   number of nodes, rank of this node, address of node 0, its port (29400)
#   QAD_INTERFACE   network interface (such as ib0) of several nodes for the rendezvous, NCCL and gloo; node 0's address must be
#                   on it. A job on one node listens on the loopback interface only.
#   QAD_JOB_DIR     directory for stop requests to the job (docs/launching.md)
#   QAD_JOIN_TIMEOUT   seconds to wait for the other nodes, including the start of node 0 (900)
# The program is searched for in the current directory, then in the project's directory.
# On SIGTERM or SIGUSR1 to this script, a training job saves after its current step and exits with status 0; Ctrl-C ends it.
set -euo pipefail
if [[ $# -eq 0 ]]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; fi
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/integers.sh
source "$here/integers.sh"
nodes=$(integer NNODES "${NNODES:-1}" 1)
# shellcheck source=launch/program.sh
source "$here/program.sh"

num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || num_gpus=0
if [[ -z ${NPROC_PER_NODE:-} && $num_gpus -eq 0 ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  echo "error: this machine has GPUs (/dev/nvidia*), but nvidia-smi does not list them or is missing. Set NPROC_PER_NODE." >&2
  exit 2
fi
processes=$(integer NPROC_PER_NODE "${NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}" 1)
if [[ $nodes -gt 1 ]]; then
  : "${MASTER_ADDR:?NNODES=$nodes needs the address of node 0}" "${NODE_RANK:?NNODES=$nodes needs the rank of this node, 0 to $((nodes - 1))}"
  rank=$(integer NODE_RANK "$NODE_RANK" 0 $((nodes - 1)))
  port=$(integer MASTER_PORT "${MASTER_PORT:-29400}" 1 65535)
  # read_timeout limits the wait for node 0's store; join_timeout starts when it is reached.
  join=$(integer QAD_JOIN_TIMEOUT "${QAD_JOIN_TIMEOUT:-900}" 1)
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "${QAD_RENDEZVOUS_ID:-qad}"
    --rdzv-conf "is_host=$((rank == 0)),join_timeout=$join,read_timeout=$join")
else
  rendezvous=(--standalone)
fi

own_job_dir=
if [[ -z ${QAD_JOB_DIR:-} ]]; then
  QAD_JOB_DIR=$(mktemp -d)
  own_job_dir=$QAD_JOB_DIR
fi
export QAD_JOB_DIR
trap '[[ -z $own_job_dir ]] || rm -rf "$own_job_dir"' EXIT

# The agent and its ranks ignore stop signals until they have their own handlers: torchrun would give its ranks 30 seconds and
# then kill them in the middle of a save.
export QAD_LAUNCHER_PID=$$
(trap '' TERM USR1 INT; exec python "$launch/agent.py" --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" \
  python "$launch/rank.py" "$program" "${@:2}") &
agent=$!
trap 'interrupted=1; touch "$QAD_JOB_DIR/stop"' TERM USR1
trap 'interrupted=1; kill -INT "$agent" 2>/dev/null || true' INT  # a background process gets no SIGINT from the terminal
interrupted=1
while [[ $interrupted ]]; do  # a signal interrupts wait but not the agent
  interrupted=
  code=0
  wait "$agent" || code=$?
done
case $code in
  129 | 130 | 137)  # SIGHUP, SIGINT or SIGKILL ended the agent, and the kernel ended its ranks
    echo "torchrun.sh: ended by signal $((code - 128)). The steps since the last checkpoint are lost; run the same command again to resume from it." >&2
    ;;
esac
exit "$code"
