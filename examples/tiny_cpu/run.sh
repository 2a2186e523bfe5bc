#!/usr/bin/env bash
# The whole method on two CPU cores in minutes: a teacher in two stages, then PTQ, QAT and QAD from it, export, validation,
# report. Ends with an error unless QAD recovers what it should (check.py says what that is).
#   examples/tiny_cpu/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/tiny_cpu}
here=examples/tiny_cpu
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
if [ -e "$out" ]; then echo "$out exists; remove it or name another directory: $0 DIRECTORY" >&2; exit 1; fi
mkdir -p "$out/log"
started=$SECONDS
say() { printf '[%3d s] %s\n' "$((SECONDS - started))" "$*"; }

# One step of the demo: its name, then its command; what it prints goes to a log that is shown if it fails.
step() {
  local name=$1; shift
  say "$name"
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 40 "$out/log/$name.txt"; say "$name failed; all of it: $out/log/$name.txt"; exit 1; }
}

# Waits for the steps in the background; one that failed ends the demo.
wait_all() {
  local job
  for job in $(jobs -p); do wait "$job"; done
}

# A training job on two ranks (--save and the losses differ, the rest is in train.yaml).
train() {
  local name=$1; shift
  step "$name" torchrun --standalone --nproc-per-node 2 pretrain_qad.py --config "$here/train.yaml" \
    --save "$out/$name" --tensorboard-dir "$out/$name/tensorboard" --valid-data-path "$out/data/heldout" "$@"
  grep -h 'megatron_qad validation' "$out/log/$name.txt" | tail -n 1 | sed 's/.*iteration/        iteration/'
}

step inputs python "$here/make_inputs.py" "$out/inputs"
mkdir "$out/data"
for text in raw post heldout; do
  step "data-$text" python tools/prepare_data.py --input "$out/inputs/$text.txt" --split-on $'\n\x1e\n' \
    --tokenizer "$out/inputs/hf/tokenizer.model" --output "$out/data/$text" &
done
step import python tools/import_hf.py --hf-model "$out/inputs/hf" --output "$out/untrained"
wait_all

# The teacher: an ordinary BF16 model, trained on the raw text, then on text of another manner.
bf16=(--qad-loss ce --qad-policy bf16)
train teacher-stage1 "${bf16[@]}" --qad-student "$out/untrained" --train-data-path "$out/data/raw" --train-iters 300 --lr 3e-3
train teacher-stage2 "${bf16[@]}" --qad-student "$out/teacher-stage1" --train-data-path "$out/data/post" --train-iters 60 --lr 1e-3

# Three ways to NVFP4 from the same teacher, on the same data.
from_teacher=(--qad-teacher "$out/teacher-stage2" --train-data-path "$out/data/raw")
train ptq "${from_teacher[@]}" --qad-ptq
train qat "${from_teacher[@]}" --qad-loss ce --train-iters 100 --lr 5e-4
train qad "${from_teacher[@]}" --qad-loss kl --train-iters 150 --lr 5e-4

step export-teacher python tools/export_hf.py --checkpoint "$out/teacher-stage2" --output "$out/hf-teacher" --layout bf16 &
for layout in modelopt compressed-tensors; do
  step "export-$layout" python tools/export_hf.py --checkpoint "$out/qad" --output "$out/hf-$layout" --layout "$layout" &
done
wait_all
for layout in modelopt compressed-tensors; do
  step "validate-$layout" python tools/validate_nvfp4.py "$out/hf-$layout"
  tail -n 1 "$out/log/validate-$layout.txt"
done
step report python tools/report.py --title "Tiny Llama on two CPU cores" --teacher "$out/teacher-stage2" \
  --run PTQ="$out/ptq" --run QAT="$out/qat" --run QAD="$out/qad" --output "$out/report"
say "reload with transformers and check"
python "$here/check.py" "$out"
say "done: $out/report/report.md, $out/hf-modelopt, $out/hf-compressed-tensors"
