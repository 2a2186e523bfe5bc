#!/usr/bin/env bash
# The whole workflow of a recipe on one node, from a Hugging Face model and text to a validated NVFP4 export and a report:
#   examples/recipes/run.sh examples/recipes/MODEL/8x80gb.yaml HF_DIR CHATS_OR_TEXT WORK [FLAGS...]
# Flags of pretrain_qad.py override the recipe's. The same command again resumes: finished steps are skipped, training continues
# from its last checkpoint. Recipes for several nodes run as SLURM jobs (README.md of this directory). Variables:
#   NPROC_PER_NODE      number of ranks; default: the number of GPUs, or 1
#   QAD_SELECT_TEXT     other chats or text, on which the checkpoints are compared; default: the validation set
#   QAD_SELECT_COMMAND  command that benchmarks a checkpoint, instead of its KL (docs/selection.md)
set -euo pipefail
if [[ $# -lt 4 ]]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; fi
recipe=$(realpath "$1") hf=$(realpath "$2") text=$(realpath "$3")
mkdir -p "$4/data"
out=$(realpath "$4")
[[ -z ${QAD_SELECT_TEXT:-} ]] || QAD_SELECT_TEXT=$(realpath "$QAD_SELECT_TEXT")
shift 4
cd "$(dirname "$0")/../.."
source examples/once.sh

training=$(dirname "$recipe")/training.yaml
settings=(--config examples/recipes/common.yaml --config "$training" --config "$recipe")
settings+=(--qad-teacher "$out/teacher" --train-data-path "$out/data/text" --valid-data-path "$out/data/text_valid" "$@")
num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || num_gpus=0
ranks=${NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}

# prepare NAME FILE FLAGS...
prepare() {
  run_once "data-$1" python tools/prepare_data.py --input "$2" --tokenizer "$hf" --output "$out/data/$1" "${@:3}"
  tail -n 1 "$out/log/data-$1.txt"
}

run_once import python tools/import_hf.py --hf-model "$hf" --output "$out/teacher" --reuse-existing
prepare text "$text" --validation-fraction 0.01
[[ -z ${QAD_SELECT_TEXT:-} ]] || prepare select "$QAD_SELECT_TEXT"

WORLD_SIZE=$ranks python pretrain_qad.py "${settings[@]}" --save "$out/qad" --qad-dry-run | tee "$out/log/dry-run.txt"

run_once ptq launch/torchrun.sh pretrain_qad.py "${settings[@]}" --save "$out/ptq" --qad-ptq
# A job that was stopped also ends with status 0, so the last saved iteration says whether it has finished.
last=$(sed -n 's/^training *\([0-9]*\) iterations.*/\1/p' "$out/log/dry-run.txt")
finished() { [[ $(cat "$out/qad/latest_checkpointed_iteration.txt" 2>/dev/null) == "$last" ]]; }
if ! finished; then
  echo "$(date +%H:%M:%S) qad, $last iterations; log: $out/log/qad.txt"
  launch/torchrun.sh pretrain_qad.py "${settings[@]}" --save "$out/qad" >>"$out/log/qad.txt" 2>&1 || {
    tail -n 40 "$out/log/qad.txt"
    echo "qad failed; complete log: $out/log/qad.txt"
    exit 1
  }
  finished || { echo "qad was stopped before its last iteration. Start the same command again to resume."; exit 75; }
fi
grep -h 'megatron_qad validation' "$out/log/ptq.txt" "$out/log/qad.txt" | tail -n 12

if [[ -n ${QAD_SELECT_COMMAND:-} ]]; then
  run_once select python tools/select_checkpoint.py --run "$out/qad" --output "$out/selection" --command "$QAD_SELECT_COMMAND"
else
  compared=$out/data/text_valid
  [[ -z ${QAD_SELECT_TEXT:-} ]] || compared=$out/data/select
  run_once select python tools/select_checkpoint.py --run "$out/qad" --output "$out/selection" --teacher "$out/teacher" \
    "${settings[@]}" --valid-data-path "$compared"
fi
cat "$out/selection/selection.md"

run_once export python tools/export_hf.py --checkpoint "$out/qad" --iteration selected --output "$out/hf-modelopt" \
  --layout modelopt --reuse-existing
run_once validate python tools/validate_nvfp4.py "$out/hf-modelopt" --against "$hf"
tail -n 1 "$out/log/validate.txt"
run_once report python tools/report.py --title "$(basename "$(dirname "$recipe")")" --teacher "$out/teacher" --run PTQ="$out/ptq" \
  --run QAD="$out/qad" --export "$out/hf-modelopt" --output "$out/report"
echo "report: $out/report/report.html"
echo "vllm serve $out/hf-modelopt"
