#!/usr/bin/env bash
# The complete method on two CPU cores in minutes: trains a teacher in two stages, runs PTQ, QAT and QAD from it, exports,
# validates and writes a run report. Ends with an error if the results miss the goals in check.py.
#   examples/tiny_cpu/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny_cpu}
here=examples/tiny_cpu
source examples/steps.sh

prepare_texts

# training NAME ABOUT COMMAND FLAGS...: a job with two ranks, the settings of train.yaml, and a validation on held-out text.
training() {
  local name=$1
  job_ranks=$ranks job train "$name" "$2" "$3" --config "$here/train.yaml" --save "$out/$name" --tensorboard-dir "$out/$name/tensorboard" \
    --valid-data-path "$out/data/heldout" "${@:4}"
}

# The teacher: a BF16 model, trained on the raw text and then on text in another style.
bf16=(--qad-loss ce --qad-policy bf16)
training teacher-stage1 "trains the BF16 teacher on raw text" train "${bf16[@]}" --qad-student "$out/untrained" \
  --train-data-path "$out/data/raw" --train-iters 300 --lr 3e-3
training teacher-stage2 "trains it on text in another style" train "${bf16[@]}" --qad-student "$out/teacher-stage1" \
  --train-data-path "$out/data/post" --train-iters 60 --lr 1e-3

# PTQ, QAT and QAD from the same teacher, on the same data.
from_teacher=(--qad-teacher "$out/teacher-stage2" --train-data-path "$out/data/raw")
training ptq "quantizes the teacher to NVFP4, without training" ptq "${from_teacher[@]}"
training qat "trains the quantized model on its task loss" train "${from_teacher[@]}" --qad-loss ce --train-iters 60 --lr 5e-4
training qad "trains the quantized model with KL to the teacher" train "${from_teacher[@]}" --qad-loss kl --train-iters 200 --lr 3e-4

# Export and validate QAD's model. Evaluate PTQ, QAT, QAD and the export on the same held-out text.
export_as() { job "$1" "export-$2" "exports $3 as $2" export --checkpoint "$out/$3" --output "$out/hf-$2" --layout "${4:-$2}"; }
validate() { job "$1" "validate-$2" "checks the export" validate "$out/hf-$2" --against "$out/hf-teacher"; }
evaluate() {
  job "$1" "evaluate-$2" "measures the KL of $2 token by token" evaluate --config "$here/train.yaml" --name "$2" --model "$out/$3" \
    "${from_teacher[@]}" --valid-data-path "$out/data/heldout" --output "$out/records/$2"
}
export_as first teacher teacher-stage2 bf16
export_as second modelopt qad
export_as second compressed-tensors qad
for layout in modelopt compressed-tensors; do validate third "$layout"; done
for model in PTQ QAD; do evaluate third "$model" "${model,,}"; done
evaluate fourth QAT qat
evaluate fourth exported hf-modelopt
job report report "writes the run report" report --title "Tiny Llama on two CPU cores" --teacher "$out/teacher-stage2" \
  --run PTQ="$out/ptq" --run QAT="$out/qat" --run QAD="$out/qad" --export "$out/hf-modelopt" \
  --evaluations "$out"/records/PTQ "$out"/records/QAT "$out"/records/QAD "$out"/records/exported --output "$out/report"

run_chains data-raw,data-post,data-heldout,import train first,second third,fourth report
for layout in modelopt compressed-tensors; do tail -n 1 "$out/log/validate-$layout.txt"; done
say "reload with transformers and check"
python "$here/check.py" "$out" 2>"$out/log/check.txt" || { tail -n 20 "$out/log/check.txt"; exit 1; }  # bars of transformers
say "done"
printf '        %s\n' "report:   $out/report/report.html" "picture:  $out/report/report.png" \
  "exports:  $out/hf-modelopt (vLLM), $out/hf-compressed-tensors (vLLM, transformers)"
