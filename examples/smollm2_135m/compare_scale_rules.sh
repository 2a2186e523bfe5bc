#!/usr/bin/env bash
# Trains SmolLM2 for 24 iterations with several rules for the scales of NVFP4 weights, from the smoothed teacher of run.sh, and prints a
# table of the results on held-out text. Needs the text and the smoothed teacher of run.sh (make smollm2) and, on two CPU cores, about
# 18 minutes for each rule. A second call skips finished jobs.
#   examples/smollm2_135m/compare_scale_rules.sh [SMOLLM2_DIRECTORY [OUTPUT_DIRECTORY]]
set -euo pipefail
cd "$(dirname "$0")/../.."
smollm2=${1:-runs/smollm2_135m}
out=${2:-$smollm2/scale_rules}
here=examples/smollm2_135m
[ -d "$smollm2/smoothed" ] || { echo "$smollm2 holds no smoothed teacher: run $here/run.sh $smollm2" >&2; exit 1; }
seeds=(1)
source examples/scale_rules.sh
data=(--valid-data-path "$smollm2/data/heldout" --train-data-path 0.75 "$smollm2/data/train-1" 0.25 "$smollm2/data/train-2")

policy() {
  echo "rules:"
  echo "  - {kind: [attention, mlp], format: nvfp4, scales: $1, update: $2}"
  echo "  - {kind: head, format: bf16}"
}

quantize smoothed "$smollm2/smoothed" 1 --train-iters 24
run_chains rules
python examples/scale_rules_table.py "$out" smoothed
