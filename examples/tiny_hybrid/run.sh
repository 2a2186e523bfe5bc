#!/usr/bin/env bash
# The complete method on a tiny Nemotron-H with Mamba, attention, MLP and expert layers and the policy of Nemotron 3 Nano, with
# expert parallelism 2 on two CPU cores: trains a teacher in two stages, runs PTQ, QAT and QAD from it, exports, validates and
# writes a run report. Ends with an error if the results miss the limits in check.py.
#   examples/tiny_hybrid/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny_hybrid}
here=examples/tiny_hybrid
source examples/steps.sh

prepare_texts

# training NAME ABOUT COMMAND FLAGS...: a job with two ranks, the settings of train.yaml, and a validation on held-out text.
training() {
  local name=$1
  job_ranks=$ranks job train "$name" "$2" "$3" --config "$here/train.yaml" --expert-model-parallel-size "$ranks" --save "$out/$name" \
    --tensorboard-dir "$out/$name/tensorboard" --valid-data-path "$out/data/heldout" "${@:4}"
}

# The teacher: a BF16 model with trained routers, trained on the raw text and then on text in another style.
bf16=(--qad-loss ce --qad-policy bf16 --qad-train-router)
training teacher-stage1 "trains the BF16 teacher on raw text" train "${bf16[@]}" --qad-student "$out/untrained" \
  --train-data-path "$out/data/raw" --train-iters 200 --lr 3e-3
training teacher-stage2 "trains it on text in another style" train "${bf16[@]}" --qad-student "$out/teacher-stage1" \
  --train-data-path "$out/data/post" --train-iters 40 --lr 1e-3

# PTQ, QAT and QAD from the same teacher, on the same data, with the teacher's routers.
from_teacher=(--qad-teacher "$out/teacher-stage2" --train-data-path "$out/data/raw" --qad-policy "$here/policy.yaml")
training ptq "quantizes the teacher to NVFP4, without training" ptq "${from_teacher[@]}"
training qat "trains the quantized model on its task loss" train "${from_teacher[@]}" --qad-loss ce --train-iters 60 --lr 5e-4
training qad "trains the quantized model with KL to the teacher" train "${from_teacher[@]}" --qad-loss kl --train-iters 120 --lr 2e-4

job first export-teacher "exports the teacher" export --checkpoint "$out/teacher-stage2" --output "$out/hf-teacher" --layout bf16
for layout in modelopt bf16; do
  job second "export-$layout" "exports QAD as $layout" export --checkpoint "$out/qad" --output "$out/hf-$layout" --layout "$layout"
done
job third validate "checks the export" validate "$out/hf-modelopt" --against "$out/hf-teacher"
job fourth report "writes the run report" report --title "Tiny Nemotron-H on two CPU cores" --teacher "$out/teacher-stage2" \
  --run PTQ="$out/ptq" --run QAT="$out/qat" --run QAD="$out/qad" --export "$out/hf-modelopt" --output "$out/report"

run_chains data-raw,data-post,data-heldout,import train first,second third,fourth
tail -n 1 "$out/log/validate.txt"
say "reload with transformers and check"
python "$here/check.py" "$out" 2>"$out/log/check.txt" || { tail -n 20 "$out/log/check.txt"; exit 1; }  # bars of transformers
say "done"
printf '        %s\n' "report:  $out/report/report.html" "picture: $out/report/report.png" "export:  $out/hf-modelopt"
