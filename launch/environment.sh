# Environment variables of every rank. Sourced by program.sh, after integers.sh; variables that the caller has set are kept.
# shellcheck shell=bash

# Megatron overlaps tensor-parallel collectives with GEMMs and needs kernels to start in the order in which they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# The ranks of a node share its cores, so more than one thread for each rank would only cause contention. A single process on a
# node of a SLURM job, such as an export, uses all cores of the job.
threads=1
[[ ${NPROC_PER_NODE:-} != 1 ]] || threads=$(integer SLURM_CPUS_ON_NODE "${SLURM_CPUS_ON_NODE:-1}" 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
# Data workers are forked: the tokenizers library would warn and disable its threads in each of them.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# The lengths of sequences and of expert batches vary: with expandable segments, freed memory stays usable.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Log lines appear in order, including those before a crash.
export PYTHONUNBUFFERED=1
# A rank that a signal kills prints its Python traceback.
export PYTHONFAULTHANDLER=1

# Compiled kernels are cached on the node's own disk: on a shared disk, every rank of every node would write the same files at
# the same time, and home directories have quotas and slow locks. One directory for each user, so that later jobs reuse it.
qad_cache=${QAD_CACHE_DIR:-}
if [[ -z $qad_cache ]]; then
  qad_cache=${TMPDIR:-/tmp}/megatron_qad-$(id -u)
  # Code in the cache is executed, and in /tmp another user could have created the directory first.
  mkdir -m 700 "$qad_cache" 2>/dev/null || true
  if [[ -L $qad_cache || ! -d $qad_cache || ! -O $qad_cache ]]; then
    echo "error: $qad_cache: expected a directory that you own, and not a link, for compiled kernels;" \
      "found: $(ls -ld "$qad_cache" 2>&1). Remove it or set QAD_CACHE_DIR." >&2
    return 1
  fi
  chmod 700 "$qad_cache"
fi
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$qad_cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$qad_cache/inductor}

# NCCL prints warnings and errors only.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A failed rank ends the job immediately instead of leaving the others waiting in a collective.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The network interface for the sockets of NCCL and gloo; agent.py binds the rendezvous to it. A job on one node needs no
# network: its sockets listen on the loopback interface only, where other machines cannot reach them.
if [[ $(integer NNODES "${NNODES:-1}" 1) -eq 1 ]]; then export QAD_INTERFACE=lo; fi
if [[ -n ${QAD_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$QAD_INTERFACE}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$QAD_INTERFACE}
fi
# This variable would let torch.load run code from checkpoints (docs/security.md).
unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
