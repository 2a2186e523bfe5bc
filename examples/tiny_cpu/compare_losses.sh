#!/usr/bin/env bash
# Trains the tiny model of run.sh with several losses, from the same teacher and on the same data, and prints a table of the
# results on held-out text. Needs the output of run.sh (make demo) and a minute or two per loss. FLAGS are passed to each job,
# such as another learning rate, another seed of the data, or a student that starts far from the teacher (its first stage).
#   examples/tiny_cpu/compare_losses.sh [DEMO_DIRECTORY [OUTPUT_DIRECTORY [FLAGS ...]]]
#   examples/tiny_cpu/compare_losses.sh runs/tiny_cpu runs/far --qad-student runs/tiny_cpu/teacher-stage1 --seed 2
set -euo pipefail
cd "$(dirname "$0")/../.."
demo=${1:-runs/tiny_cpu}
out=${2:-$demo/losses}
shift $(($# < 2 ? $# : 2))
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
[ -d "$demo/teacher-stage2" ] || { echo "$demo holds no finished demo: run examples/tiny_cpu/run.sh $demo" >&2; exit 1; }
mkdir -p "$out"
source examples/ranks.sh
# Name and loss. Adam does not depend on the scale of a loss; its weight only matters relative to weight decay and clipping.
losses=(
  "kl|kl"
  "reverse_kl|reverse_kl"
  "jsd|jsd"
  "mse|mse"
  "ce|ce"
  "kl_hidden|kl + 0.1*hidden_mse"
)
printf '| loss | KL to the teacher | cross entropy | top-1 agreement |\n|---|---|---|---|\n'
for entry in "${losses[@]}"; do
  name=${entry%%|*} loss=${entry##*|}
  NPROC_PER_NODE=$ranks megatron-qad train --config examples/tiny_cpu/train.yaml \
    --qad-teacher "$demo/teacher-stage2" --qad-loss "$loss" --train-data-path "$demo/data/raw" \
    --valid-data-path "$demo/data/heldout" --train-iters 150 --lr 5e-4 --save "$out/$name" "$@" >"$out/$name.txt" 2>&1 ||
    { tail -n 40 "$out/$name.txt"; exit 1; }
  grep -h 'megatron_qad validation' "$out/$name.txt" | tail -n 1 |
    sed -E "s/.*kl_to_teacher: ([^ ]+) .* cross_entropy: ([^ ]+) .*teacher_cross.*top1_agreement: ([^ ]+) .*/| $loss | \1 | \2 | \3 |/"
done
