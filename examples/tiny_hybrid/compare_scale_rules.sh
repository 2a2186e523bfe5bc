#!/usr/bin/env bash
# Trains the tiny hybrid of run.sh with several rules for the scales of NVFP4 weights, from the plain teacher and from the smoothed
# one, and prints a table of the results on held-out text. Needs the output of run.sh (make tiny-hybrid) and, on two CPU cores, two to
# five minutes per job. A second call skips finished jobs, so more seeds can be added.
#   examples/tiny_hybrid/compare_scale_rules.sh [HYBRID_DIRECTORY [OUTPUT_DIRECTORY [SEED ...]]]
set -euo pipefail
cd "$(dirname "$0")/../.."
hybrid=${1:-runs/tiny_hybrid}
out=${2:-$hybrid/scale_rules}
shift $(($# < 2 ? $# : 2))
seeds=("${@:-1}")
ptq=yes
here=examples/tiny_hybrid
[ -d "$hybrid/teacher-stage2" ] || { echo "$hybrid holds no finished example: run $here/run.sh $hybrid" >&2; exit 1; }
source examples/scale_rules.sh
data=(--expert-model-parallel-size "$ranks" --train-data-path "$hybrid/data/raw" --valid-data-path "$hybrid/data/heldout")

policy() { sed "s/format: nvfp4}/format: nvfp4, scales: $1, update: $2}/" "$here/policy.yaml"; }

job_ranks=$ranks job rules smooth "smooths the teacher" smooth --config "$here/train.yaml" --qad-teacher "$hybrid/teacher-stage2" \
  --qad-policy "$here/policy.yaml" --output "$out/smoothed" "${data[@]}"
for seed in "${seeds[@]}"; do
  for start in plain smoothed; do
    teacher=$hybrid/teacher-stage2
    [ "$start" = plain ] || teacher=$out/smoothed
    quantize "$start" "$teacher" "$seed" --train-iters 120 --lr 2e-4
  done
done
run_chains rules
python examples/scale_rules_table.py "$out" plain smoothed
