#!/usr/bin/env bash
# QAD of a tiny vision-language model with images and with text only, on two CPU cores: draws pictures, trains a vision encoder, and
# two teachers: A in one stage on captions, questions and text together, B in two stages, first on captions and text, then on
# questions whose answers are sentences. From each: PTQ, QAT, QAD with image-text data, and QAD with as many steps on text only.
# The training data of QAT and QAD is that of the teacher's first stage. Exports A's model, validates it, writes a run report, and
# prints for each model the KL to its teacher and the accuracy of its answers on held-out pictures and texts.
#   examples/tiny_vision/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny_vision}
here=examples/tiny_vision
source examples/steps.sh
first_steps=${FIRST_STEPS:-2000} second_steps=${SECOND_STEPS:-500} steps=${STEPS:-300} rate=1e-4

step inputs "draws pictures and writes chats and a tokenizer" python "$here/make_inputs.py" "$out/inputs"
OMP_NUM_THREADS=2 step encoder "trains the vision encoder" python "$here/train_encoder.py" "$out/inputs/hf"
tail -n 2 "$out/log/encoder.txt"

d=$out/data
# training CHAIN NAME ABOUT COMMAND FLAGS...: train or ptq, which validate on the first 64 held-out rows.
training() { job "${@:1:4}" --config "$here/train.yaml" --save "$out/$2" --eval-iters 2 "${@:5}"; }
# data NAME INPUT...: prepares chats in a chain of its own.
data() {
  local name=$1; shift
  job "data-$name" "data-$name" "tokenizes" prepare --input "${@/#/$out/inputs/}" --tokenizer "$out/inputs/hf" \
    --images-for "$out/inputs/hf" --output "$d/$name" --max-bad-fraction 0
}

data a questions.jsonl captions.jsonl text.jsonl
data b captions.jsonl text.jsonl
data text text.jsonl
data sentences sentences.jsonl
data heldout_a heldout_words.jsonl
data heldout_b heldout_sentences.jsonl
job import import "imports the model" import --hf-model "$out/inputs/hf" --output "$out/untrained"

bf16=(--qad-loss ce --qad-policy bf16)
training teacher-a a-teacher "trains teacher A" train "${bf16[@]}" --qad-student "$out/untrained" --train-data-path "$d/a" --valid-data-path "$d/heldout_a" \
  --train-iters "$((first_steps + second_steps))" --lr 3e-3
training teacher-b b-first "trains teacher B on captions and text" train "${bf16[@]}" --qad-student "$out/untrained" --train-data-path "$d/b" --valid-data-path "$d/heldout_b" \
  --train-iters "$first_steps" --lr 3e-3
training teacher-b b-teacher "trains it on questions" train "${bf16[@]}" --qad-student "$out/b-first" --train-data-path "$d/sentences" \
  --valid-data-path "$d/heldout_b" --train-iters "$second_steps" --lr 2e-3

for t in a b; do
  flags=(--qad-teacher "$out/$t-teacher" --valid-data-path "$d/heldout_$t")
  student=("${flags[@]}" --qad-policy nemotron-nano-12b-v2-vl)
  trained=("${student[@]}" --train-iters "$steps" --lr "$rate")
  training "$t-ptq" "$t-ptq" "quantizes the teacher" ptq "${student[@]}" --train-data-path "$d/$t"
  training "$t-qat" "$t-qat" "trains on the task loss" train "${trained[@]}" --train-data-path "$d/$t" --qad-loss ce
  training "$t-qad_images" "$t-qad_images" "distills with images and text" train "${trained[@]}" --train-data-path "$d/$t" --qad-loss kl
  training "$t-qad_text" "$t-qad_text" "distills with text only" train "${trained[@]}" --train-data-path "$d/text" --qad-loss kl
  for model in teacher ptq qat qad_images qad_text; do
    job "$t-$model" "evaluate-$t-$model" "measures the KL" evaluate --config "$here/train.yaml" --model "$out/$t-$model" \
      --output "$out/records/$t-$model" --name "$model" "${flags[@]}" --train-data-path "$d/text"
  done
done
job export export-teacher "exports the teacher" export --checkpoint "$out/a-teacher" --output "$out/hf-teacher" --layout bf16
job export export-modelopt "exports QAD" export --checkpoint "$out/a-qad_images" --output "$out/hf-modelopt" --layout modelopt
job export validate "checks the export" validate "$out/hf-modelopt" --against "$out/hf-teacher"
job export report "writes the run report" report --title "Tiny vision-language model on two CPU cores" --teacher "$out/a-teacher" \
  --run PTQ="$out/a-ptq" --run QAT="$out/a-qat" --run QAD="$out/a-qad_images" --run QAD-text="$out/a-qad_text" \
  --export "$out/hf-modelopt" --output "$out/report"

run_chains data-a,data-b,data-text,data-sentences,data-heldout_a,data-heldout_b,import teacher-a,teacher-b \
  a-teacher,a-ptq,a-qat,a-qad_images,a-qad_text,b-teacher,b-ptq,b-qat,b-qad_images,b-qad_text export
tail -n 1 "$out/log/validate.txt"
say "table"
python "$here/check.py" "$out" | tee "$out/table.md"
say "done"
printf '        %s\n' "report:  $out/report/report.html" "pictures: $out/inputs/pictures" "export:  $out/hf-modelopt"
