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
here=examples/tiny_hybrid
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
[ -d "$hybrid/teacher-stage2" ] || { echo "$hybrid holds no finished example: run $here/run.sh $hybrid" >&2; exit 1; }
mkdir -p "$out/log"
source examples/ranks.sh
arms=(max:every_step four_over_six:every_step four_over_six:frozen mse:frozen local_hessian:frozen)

# once NAME PROGRAM FLAGS...: runs a job with the settings of train.yaml, unless it has finished before.
once() {
  local name=$1 program=$2; shift 2
  [ ! -e "$out/log/$name.done" ] || return 0
  echo "$(date +%H:%M:%S) $name"
  NPROC_PER_NODE=$ranks launch/torchrun.sh "$program" --config "$here/train.yaml" --expert-model-parallel-size "$ranks" \
    --train-data-path "$hybrid/data/raw" --valid-data-path "$hybrid/data/heldout" "$@" >"$out/log/$name.txt" 2>&1 ||
    { tail -n 40 "$out/log/$name.txt"; exit 1; }
  touch "$out/log/$name.done"
}

# quantize START TEACHER SEED: PTQ and QAD with each rule.
quantize() {
  local arm rule update name
  for arm in "${arms[@]}"; do
    rule=${arm%:*} update=${arm#*:} name=$1-${arm/:/-}
    sed "s/format: nvfp4}/format: nvfp4, scales: $rule, update: $update}/" "$here/policy.yaml" >"$out/$name.yaml"
    once "$name-ptq" pretrain_qad.py --qad-teacher "$2" --qad-policy "$out/$name.yaml" --save "$out/$name-ptq" --qad-ptq
    once "$name-$3" pretrain_qad.py --qad-teacher "$2" --qad-policy "$out/$name.yaml" --save "$out/$name-$3" \
      --train-iters 120 --lr 2e-4 --seed "$3"
    # The flags of the job, with its last checkpoint as the student.
    once "$name-$3-noise" tools/noise_floor.py --qad-teacher "$2" --qad-policy "$out/$name.yaml" --qad-student "$out/$name-$3" \
      --output "$out/$name-$3/noise.json"
  done
}

once smooth tools/smooth.py --qad-teacher "$hybrid/teacher-stage2" --qad-policy "$here/policy.yaml" --output "$out/smoothed"
for seed in "${seeds[@]}"; do
  quantize plain "$hybrid/teacher-stage2" "$seed"
  quantize smoothed "$out/smoothed" "$seed"
done
python "$here/scale_rules_table.py" "$out" "${arms[@]}"
