# Settings of every rank, each with its reason. Sourced by torchrun.sh; what the caller has set already is kept.
# shellcheck shell=bash

# Megatron overlaps tensor-parallel collectives with GEMMs and needs them launched in the order in which they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Ranks share the cores of a node: threads of every rank on all of them would only wait for each other. The only process of a
# SLURM job's node, such as an export, takes the cores that the job was given.
threads=1
[[ ${NPROC_PER_NODE:-} != 1 ]] || threads=${SLURM_CPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
# Data workers are forked; the tokenizers library would warn and turn its threads off in each of them.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# The lengths of sequences and of experts' batches vary: segments that can grow keep freed memory usable.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Log lines in the order in which they were written, also those before a crash.
export PYTHONUNBUFFERED=1
# A rank that is killed by a signal says in which Python line.
export PYTHONFAULTHANDLER=1

# Compiled kernels on the node's own disk: on a shared one, every rank of every node would write the same files at once,
# and a home directory's quota and locks would be in the way. One place a user, so that a second job finds them.
qad_cache=${QAD_CACHE_DIR:-}
if [[ -z $qad_cache ]]; then
  qad_cache=${TMPDIR:-/tmp}/megatron_qad-$(id -u)
  # Whoever writes there has his code run here, and in /tmp anybody could have made it first.
  mkdir -m 700 "$qad_cache" 2>/dev/null || true
  if [[ -L $qad_cache || ! -d $qad_cache || ! -O $qad_cache ]]; then
    echo "error: $qad_cache: expected a directory that is yours, and no link, for compiled kernels;" \
      "found: $(ls -ld "$qad_cache" 2>&1). Remove it or set QAD_CACHE_DIR" >&2
    return 1
  fi
  chmod 700 "$qad_cache"
fi
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$qad_cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$qad_cache/inductor}

# NCCL says what went wrong, and nothing else.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank that fails ends the job at once instead of leaving the others in a collective.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Which network may be used: NCCL's and gloo's sockets take this interface's address; agent.py binds the rendezvous to it.
if [[ -n ${QAD_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$QAD_INTERFACE}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$QAD_INTERFACE}
fi
# Checkpoints are data: a variable that would let torch.load run code from them is not passed on (docs/security.md).
unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
