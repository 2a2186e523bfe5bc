# Chains of jobs; to be sourced with $out (output directory) set.
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
rm -rf "$out/jobs"
mkdir -p "$out/log" "$out/jobs"
source examples/ranks.sh
started=$SECONDS

# job CHAIN NAME ABOUT COMMAND FLAGS...: adds "megatron-qad COMMAND FLAGS" to a chain of jobs, which run_chains runs one after the other.
# Jobs have one rank, or as many as $job_ranks says.
job() {
  local chain=$1 name=$2 about=$3; shift 3
  printf '%q ' "$name" "${job_ranks:-1}" "$about" "$@" >>"$out/jobs/$chain"
  echo >>"$out/jobs/$chain"
}

# run_chains CHAIN[,CHAIN...]...: runs chains, in parallel if they are joined by commas, in forks of one process: the imports take longer
# than many of these jobs. Jobs that have finished before are left out.
run_chains() { python examples/jobs.py --elapsed "$((SECONDS - started))" "$out" "$@"; }
