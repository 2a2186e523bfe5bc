#!/usr/bin/env bash
# Starts a program on all GPUs of this node, alone or as one node of several:
#   launch/torchrun.sh pretrain_qad.py --qad-teacher CKPT ...
#   NNODES=4 NODE_RANK=2 MASTER_ADDR=10.0.0.1 launch/torchrun.sh pretrain_qad.py ...     # the same on each node, NODE_RANK 0 to 3
# Variables:
#   NPROC_PER_NODE  processes of this node; default: its GPUs, or 1
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   nodes, this one's number, address of node 0, its port (29400)
#   QAD_INTERFACE   network interface (such as ib0) for the rendezvous, NCCL and gloo; node 0's address must be on it
#   QAD_JOB_DIR     directory through which the job is asked to stop (docs/launching.md)
#   QAD_JOIN_TIMEOUT   seconds for which a node waits for the others, also for node 0 to be there at all (900)
# The program is looked for in the current directory, then in the project's.
# SIGTERM or SIGUSR1 to this script lets a training job save after the step it is in and exit with status 0; Ctrl-C ends it.
set -euo pipefail
if [[ $# -eq 0 ]]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/environment.sh
source "$here/environment.sh"
root=${here%/*}
if [[ $1 != -* && ! -e $1 && -e $root/$1 ]]; then set -- "$root/$1" "${@:2}"; fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # scripts under tools/ import the package beside this one

num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || num_gpus=0
processes=${NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}
nodes=${NNODES:-1}
if [[ $nodes -gt 1 ]]; then
  : "${MASTER_ADDR:?NNODES=$nodes needs the address of node 0}" "${NODE_RANK:?NNODES=$nodes needs the number of this node, 0 to $((nodes - 1))}"
  # join_timeout counts from when node 0's store is reached; read_timeout is how long that may take.
  join=${QAD_JOIN_TIMEOUT:-900}
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${QAD_RENDEZVOUS_ID:-qad}"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=$join,read_timeout=$join")
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

# Until the agent and its ranks have handlers of their own, they ignore the signals that ask to stop: torchrun would give its
# ranks 30 seconds and kill them in the middle of a save.
export QAD_LAUNCHER_PID=$$
(trap '' TERM USR1 INT; exec python "$here/agent.py" --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" \
  python "$here/rank.py" "$@") &
agent=$!
trap 'interrupted=1; touch "$QAD_JOB_DIR/stop"' TERM USR1
trap 'interrupted=1; kill -INT "$agent" 2>/dev/null || true' INT  # a background process gets no SIGINT from the terminal
interrupted=1
while [[ $interrupted ]]; do  # a signal ends wait, not the agent
  interrupted=
  code=0
  wait "$agent" || code=$?
done
case $code in
  129 | 130 | 137)  # SIGHUP, SIGINT or SIGKILL ended the agent, and the kernel its ranks
    echo "torchrun.sh: ended by signal $((code - 128)). The steps since the last checkpoint are lost; the same command goes on from there" >&2
    ;;
esac
exit "$code"
