#!/usr/bin/env bash
# A real post-trained model on two CPU cores: SmolLM2-135M-Instruct to NVFP4, trained on text that it wrote itself.
#   examples/smollm2_135m/run.sh [OUTPUT_DIRECTORY]
# A run that was interrupted goes on where it stopped: finished steps are skipped, generation and training resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/smollm2_135m}
here=examples/smollm2_135m
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
mkdir -p "$out/log" "$out/data"
say() { printf '[%s %4d s] %s\n' "$(date +%H:%M:%S)" "$SECONDS" "$*"; }

step() {
  local name=$1; shift
  if [ -e "$out/log/$name.done" ]; then say "$name: done before"; return; fi
  say "$name"
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 30 "$out/log/$name.txt"; say "$name failed; all of it: $out/log/$name.txt"; exit 1; }
  touch "$out/log/$name.done"
}

train() {
  local name=$1; shift
  step "$name" torchrun --standalone --nproc-per-node 2 pretrain_qad.py --config "$here/train.yaml" \
    --qad-teacher "$out/teacher" --valid-data-path "$out/data/heldout" \
    --save "$out/$name" --load "$out/$name" --tensorboard-dir "$out/$name/tensorboard" "$@"
  grep -h 'megatron_qad validation' "$out/log/$name.txt" | sed 's/.*iteration/    iteration/'
}

step extract python "$here/extract.py" "$out/hf"
step import python tools/import_hf.py --hf-model "$out/hf" --output "$out/teacher"
step prompts python "$here/prompts.py" "$out/prompts"
# Both cores generate at once: 112 answers to held-out prompts, one to each of 128 training prompts. float32, because its
# matrix products ran at 130 GFLOPS a core where bfloat16's ran at 80.
# shellcheck disable=SC2016  # the inner shell's $0 and $heldout
step generate bash -c '
  python tools/generate_data.py --model "$0/hf" --prompts "$0/prompts/heldout.txt" --output "$0/data/heldout.jsonl" \
    --num-documents 112 --batch-size 112 --max-new-tokens 256 --seed 7 --dtype float32 & heldout=$!
  python tools/generate_data.py --model "$0/hf" --prompts "$0/prompts/train.txt" --output "$0/data/train.jsonl" \
    --num-documents 128 --batch-size 128 --max-new-tokens 256 --dtype float32 && wait $heldout' "$out"
# Free text beside it, which costs no generation: the language reference that comes with Python.
step topics python "$here/topics.py" "$out/data/topics.jsonl"
for split in train topics heldout; do
  step "data-$split" python tools/prepare_data.py --input "$out/data/$split.jsonl" --tokenizer "$out/hf" --output "$out/data/$split"
  tail -n 1 "$out/log/data-$split.txt"
done
train ptq --qad-ptq --train-data-path "$out/data/train"
train qad --train-data-path 0.6 "$out/data/train" 0.4 "$out/data/topics"
# What ships is BF16 beside its NVFP4 linears: the trained weights rounded, quantized, calibrated and evaluated once more.
train shipped --bf16 --qad-ptq --qad-student "$out/qad" --train-data-path "$out/data/train"
for layout in modelopt compressed-tensors; do
  step "export-$layout" python tools/export_hf.py --checkpoint "$out/shipped" --output "$out/hf-$layout" --layout "$layout"
  step "validate-$layout" python tools/validate_nvfp4.py "$out/hf-$layout"
  tail -n 1 "$out/log/validate-$layout.txt"
done
step report python tools/report.py --title "SmolLM2-135M-Instruct" --teacher "$out/teacher" --run PTQ="$out/ptq" \
  --run QAD="$out/qad" --run shipped="$out/shipped" --output "$out/report"
step compare torchrun --standalone --nproc-per-node 1 "$here/compare.py" --config "$here/train.yaml" --qad-teacher "$out/teacher" \
  --bf16 --load "$out/shipped" --hf-model "$out/hf-compressed-tensors" --text "$out/prompts/heldout.txt"
grep -h '^prompt\|^answer\|inputs, Megatron' "$out/log/compare.txt"
say "done: $out/report/report.md"
