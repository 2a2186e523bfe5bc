#!/usr/bin/env bash
# Compares PTQ, QAT and QAD of SmolLM2 with the teacher: token by token on held-out text, and by a benchmark of 200 problems. Writes a
# report. Needs the text and the smoothed teacher of run.sh (make smollm2) and takes about 45 minutes on two CPU cores. A second call
# skips finished jobs.
#   examples/smollm2_135m/evaluate.sh [SMOLLM2_DIRECTORY [OUTPUT_DIRECTORY]]
set -euo pipefail
cd "$(dirname "$0")/../.."
smollm2=${1:-runs/smollm2_135m}
out=${2:-$smollm2/evaluation}
here=examples/smollm2_135m
teacher=$smollm2/smoothed
[ -d "$teacher" ] || { echo "$smollm2 holds no smoothed teacher: run $here/run.sh $smollm2" >&2; exit 1; }
source examples/ranks.sh
source examples/once.sh

job() {
  NPROC_PER_NODE=$ranks megatron-qad "$@" --config "$here/train.yaml" --valid-data-path "$smollm2/data/heldout" \
    --train-data-path 0.75 "$smollm2/data/train-1" 0.25 "$smollm2/data/train-2" --qad-teacher "$teacher"
}

policy=(--qad-policy "$here/policy.yaml")
once ptq ptq "${policy[@]}" --save "$out/ptq"
once qat train "${policy[@]}" --save "$out/qat" --qad-loss ce --train-iters 24
once qad train "${policy[@]}" --save "$out/qad" --train-iters 24

once evaluate-bf16 evaluate --model "$teacher" --name BF16 --output "$out/records/bf16"
for run in ptq qat qad; do
  once "evaluate-$run" evaluate --model "$out/$run" --name "${run^^}" --output "$out/records/$run"
done
run_once compare megatron-qad compare "$out"/records/{bf16,ptq,qat,qad} --baseline PTQ --tokenizer "$teacher/hf" \
  --output "$out/comparison"

run_once cloze python "$here/cloze.py" "$out/cloze"
benchmark() {
  run_once "benchmark-$1" megatron-qad benchmark --model "$2" --tasks "$out/cloze/cloze.yaml" --output "$out/benchmarks/$1"
}
for run in ptq qat qad; do
  run_once "export-$run" megatron-qad export --checkpoint "$out/$run" --output "$out/hf-$run" --layout compressed-tensors
done
{ benchmark bf16 "$smollm2/hf"; benchmark ptq "$out/hf-ptq"; } &
{ benchmark qat "$out/hf-qat"; benchmark qad "$out/hf-qad"; } &
wait_all
run_once compare-benchmarks megatron-qad compare-benchmarks BF16="$out/benchmarks/bf16" PTQ="$out/benchmarks/ptq" \
  QAT="$out/benchmarks/qat" QAD="$out/benchmarks/qad" --teacher BF16 --baseline PTQ
cat "$out/log/compare-benchmarks.txt"
run_once report megatron-qad report --title "SmolLM2-135M-Instruct" --teacher "$teacher" --run PTQ="$out/ptq" --run QAT="$out/qat" \
  --run QAD="$out/qad" --evaluations "$out"/records/{ptq,bf16,qat,qad} --export "$out/hf-qad" --output "$out/report" --benchmarks \
  BF16="$out/benchmarks/bf16" PTQ="$out/benchmarks/ptq" QAT="$out/benchmarks/qat" QAD="$out/benchmarks/qad"
echo "done: $out/comparison, $out/report/report.html"
