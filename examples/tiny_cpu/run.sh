#!/usr/bin/env bash
# The complete method on two CPU cores in minutes: trains a teacher in two stages, runs PTQ, QAT and QAD from it, exports,
# validates and writes a run report. Ends with an error if the results miss the goals in check.py.
#   examples/tiny_cpu/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny_cpu}
here=examples/tiny_cpu
source examples/steps.sh

make_inputs

# The teacher: a BF16 model, trained on the raw text and then on text in another style.
bf16=(--qad-loss ce --qad-policy bf16)
job train teacher-stage1 "${bf16[@]}" --qad-student "$out/untrained" --train-data-path "$out/data/raw" --train-iters 300 --lr 3e-3
job train teacher-stage2 "${bf16[@]}" --qad-student "$out/teacher-stage1" --train-data-path "$out/data/post" --train-iters 60 --lr 1e-3

# PTQ, QAT and QAD from the same teacher, on the same data.
from_teacher=(--qad-teacher "$out/teacher-stage2" --train-data-path "$out/data/raw")
job ptq ptq "${from_teacher[@]}"
job train qat "${from_teacher[@]}" --qad-loss ce --train-iters 60 --lr 5e-4
job train qad "${from_teacher[@]}" --qad-loss kl --train-iters 200 --lr 3e-4

step export-teacher megatron-qad export --checkpoint "$out/teacher-stage2" --output "$out/hf-teacher" --layout bf16 &
for layout in modelopt compressed-tensors; do
  step "export-$layout" megatron-qad export --checkpoint "$out/qad" --output "$out/hf-$layout" --layout "$layout" &
done
wait_all
for layout in modelopt compressed-tensors; do
  step "validate-$layout" megatron-qad validate "$out/hf-$layout" --against "$out/hf-teacher"
  tail -n 1 "$out/log/validate-$layout.txt"
done
# The same held-out text, token by token: the runs, and what was exported.
evaluate() {
  NPROC_PER_NODE=1 step "evaluate-$1" megatron-qad evaluate --config "$here/train.yaml" --name "$1" --model "$2" \
    --qad-teacher "$out/teacher-stage2" --train-data-path "$out/data/raw" --valid-data-path "$out/data/heldout" --output "$out/records/$1"
}
{ evaluate PTQ "$out/ptq"; evaluate QAD "$out/qad"; } &
{ evaluate QAT "$out/qat"; evaluate exported "$out/hf-modelopt"; } &
wait_all
step report megatron-qad report --title "Tiny Llama on two CPU cores" --teacher "$out/teacher-stage2" \
  --run PTQ="$out/ptq" --run QAT="$out/qat" --run QAD="$out/qad" --export "$out/hf-modelopt" \
  --evaluations "$out"/records/{PTQ,QAT,QAD,exported} --output "$out/report"
say "reload with transformers and check"
python "$here/check.py" "$out" 2>"$out/log/check.txt" || { tail -n 20 "$out/log/check.txt"; exit 1; }  # bars of transformers
say "done"
printf '        %s\n' "report:   $out/report/report.html" "picture:  $out/report/report.png" \
  "exports:  $out/hf-modelopt (vLLM), $out/hf-compressed-tensors (vLLM, transformers)"
