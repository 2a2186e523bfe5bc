#!/usr/bin/env bash
# QAD of a real post-trained model on two CPU cores: SmolLM2-135M-Instruct in NVFP4, smoothed, trained on its own generated text.
#   examples/smollm2_135m/run.sh [OUTPUT_DIRECTORY]
# An interrupted run resumes where it stopped: finished steps are skipped, generation and training resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/smollm2_135m}
here=examples/smollm2_135m
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# Keeps freed memory: allocating the pages of half a gigabyte of gradients in every step took 0.5 s of 7.6 s.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
mkdir -p "$out/log" "$out/data"
source examples/ranks.sh
say() { printf '[%s %4d s] %s\n' "$(date +%H:%M:%S)" "$SECONDS" "$*"; }

step() {
  local name=$1; shift
  if [ -e "$out/log/$name.done" ]; then say "$name: done before"; return; fi
  say "$name"
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 30 "$out/log/$name.txt"; say "$name failed; complete log: $out/log/$name.txt"; exit 1; }
  touch "$out/log/$name.done"
}

job() {
  local script=$1; shift
  NPROC_PER_NODE=$ranks launch/torchrun.sh "$script" --config "$here/train.yaml" \
    --train-data-path 0.75 "$out/data/train-1" 0.25 "$out/data/train-2" --valid-data-path "$out/data/heldout" "$@"
}

train() {
  local name=$1; shift
  step "$name" job pretrain_qad.py \
    --save "$out/$name" --load "$out/$name" --tensorboard-dir "$out/$name/tensorboard" "$@"
  grep -h 'megatron_qad validation' "$out/log/$name.txt" | sed 's/.*iteration/    iteration/'
}

step extract python "$here/extract.py" "$out/hf"
step import python tools/import_hf.py --hf-model "$out/hf" --output "$out/teacher"
step prompts python "$here/prompts.py" "$out/prompts"
# Both cores generate at the same time: an answer to each of 256 training prompts, and 112 answers to held-out prompts. Sampling
# is as recommended by the model card, so that the data resemble what users get.
# shellcheck disable=SC2016  # the inner shell's $0 and $other
step generate bash -c '
  answer() {
    python tools/generate_data.py --model "$0/hf" --prompts "$0/prompts/$1.txt" --output "$0/data/$1.jsonl" \
      --batch-size 192 --max-new-tokens 256 --temperature 0.2 --top-p 0.9 "${@:2}"
  }
  answer train-1 --seed 1234 & other=$!
  answer heldout --seed 7 --num-documents 112 && answer train-2 --seed 4321 && wait $other' "$out"
for split in train-1 train-2 heldout; do
  step "data-$split" python tools/prepare_data.py --input "$out/data/$split.jsonl" --tokenizer "$out/hf" --output "$out/data/$split" &
done
wait_all
tail -qn 1 "$out"/log/data-*.txt
step overlap python tools/check_overlap.py "$out/data/train-1" "$out/data/train-2" --validation "$out/data/heldout"
cat "$out/log/overlap.txt"
train ptq --qad-teacher "$out/teacher" --qad-ptq
# Smooths outliers without changing the function of the model, bit for bit. The result is teacher and initial student of QAD,
# which maps the largest value of each block to 6 or 4, whichever has the smaller error.
step smooth job tools/smooth.py --qad-teacher "$out/teacher" --output "$out/smoothed" --reuse-existing
grep -h 'megatron_qad: smoothed\|megatron_qad: final' "$out/log/smooth.txt" | sed 's/megatron_qad:/   /'
train qad --qad-teacher "$out/smoothed" --qad-weight-scale-rule four_over_six
export_in() {
  step "export-$1" python tools/export_hf.py --checkpoint "$out/qad" --output "$out/hf-$1" --layout "$1"
  step "validate-$1" python tools/validate_nvfp4.py "$out/hf-$1"
}
for layout in modelopt compressed-tensors; do export_in "$layout" & done
wait_all
tail -qn 1 "$out"/log/validate-*.txt
step report python tools/report.py --title "SmolLM2-135M-Instruct" --teacher "$out/smoothed" --run PTQ="$out/ptq" \
  --run QAD="$out/qad" --export "$out/hf-modelopt" --output "$out/report" &
NPROC_PER_NODE=1 step compare launch/torchrun.sh "$here/compare.py" --config "$here/train.yaml" --qad-teacher "$out/teacher" \
  --load "$out/qad" --hf-model "$out/hf-compressed-tensors" --text "$out/prompts/heldout.txt"
wait_all
grep -h '^prompt\|^answer\|inputs, Megatron' "$out/log/compare.txt"
say "done: $out/report/report.html"
