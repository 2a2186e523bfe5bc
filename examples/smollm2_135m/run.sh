#!/usr/bin/env bash
# QAD of a real post-trained model on two CPU cores: SmolLM2-135M-Instruct in NVFP4, smoothed, trained on its own generated text.
#   examples/smollm2_135m/run.sh [OUTPUT_DIRECTORY]
# An interrupted run resumes where it stopped: finished steps are skipped, generation and training resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/smollm2_135m}
here=examples/smollm2_135m
# Keeps freed memory: allocating the pages of half a gigabyte of gradients in every step took 0.5 s of 7.6 s.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
mkdir -p "$out/data"
source examples/ranks.sh
source examples/once.sh

job() {
  local command=$1; shift
  NPROC_PER_NODE=$ranks megatron-qad "$command" --config "$here/train.yaml" \
    --train-data-path 0.75 "$out/data/train-1" 0.25 "$out/data/train-2" --valid-data-path "$out/data/heldout" "$@"
}

# train COMMAND NAME FLAGS...: runs megatron-qad train or ptq.
train() {
  local command=$1 name=$2; shift 2
  run_once "$name" job "$command" \
    --save "$out/$name" --tensorboard-dir "$out/$name/tensorboard" "$@"
  grep -h 'megatron_qad validation' "$out/log/$name.txt" | sed 's/.*iteration/    iteration/'
}

run_once extract python "$here/extract.py" "$out/hf"
run_once import megatron-qad import --hf-model "$out/hf" --output "$out/teacher" --reuse-existing
run_once prompts python "$here/prompts.py" "$out/prompts"
# Both cores generate at the same time: an answer to each of 256 training prompts, and 112 answers to held-out prompts. Sampling
# is as recommended by the model card, so that the data resemble what users get.
# shellcheck disable=SC2016  # the inner shell's $0 and $other
run_once generate bash -c '
  answer() {
    megatron-qad generate --model "$0/hf" --prompts "$0/prompts/$1.txt" --output "$0/data/$1.jsonl" \
      --batch-size 192 --max-new-tokens 256 --temperature 0.2 --top-p 0.9 "${@:2}"
  }
  answer train-1 --seed 1234 & other=$!
  answer heldout --seed 7 --num-documents 112 && answer train-2 --seed 4321 && wait $other' "$out"
for split in train-1 train-2 heldout; do
  run_once "data-$split" megatron-qad prepare --input "$out/data/$split.jsonl" --tokenizer "$out/hf" --output "$out/data/$split" &
done
wait_all
tail -qn 1 "$out"/log/data-*.txt
run_once overlap megatron-qad overlap "$out/data/train-1" "$out/data/train-2" --validation "$out/data/heldout"
cat "$out/log/overlap.txt"
# PTQ as it is without further means: the largest magnitude of each block maps to 6.
train ptq ptq --qad-teacher "$out/teacher" --qad-weight-scale-rule max
# Smooths outliers without changing the function of the model, bit for bit. The result is teacher and initial student of QAD.
run_once smooth job smooth --qad-teacher "$out/teacher" --output "$out/smoothed" --reuse-existing
grep -h 'megatron_qad: smoothed\|megatron_qad: final' "$out/log/smooth.txt" | sed 's/megatron_qad:/   /'
train train qad --load "$out/qad" --qad-teacher "$out/smoothed" --qad-policy "$here/policy.yaml"
export_in() {
  run_once "export-$1" megatron-qad export --checkpoint "$out/qad" --output "$out/hf-$1" --layout "$1"
  run_once "validate-$1" megatron-qad validate "$out/hf-$1"
}
for layout in modelopt compressed-tensors; do export_in "$layout" & done
wait_all
tail -qn 1 "$out"/log/validate-*.txt
run_once report megatron-qad report --title "SmolLM2-135M-Instruct" --teacher "$out/smoothed" --run PTQ="$out/ptq" \
  --run QAD="$out/qad" --export "$out/hf-modelopt" --output "$out/report" &
NPROC_PER_NODE=1 run_once compare launch/torchrun.sh "$here/compare.py" --config "$here/train.yaml" --qad-teacher "$out/teacher" \
  --load "$out/qad" --hf-model "$out/hf-compressed-tensors" --text "$out/prompts/heldout.txt"
wait_all
grep -h '^prompt\|^answer\|inputs, Megatron' "$out/log/compare.txt"
echo "done after $SECONDS s: $out/report/report.html"
