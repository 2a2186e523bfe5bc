# Shared by the tiny examples; to be sourced with $here (folder of the example) and $out (a new output directory) set.
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
if [ -e "$out" ]; then echo "$out exists; remove it or name another directory: $0 DIRECTORY" >&2; exit 1; fi
mkdir -p "$out/log"
source examples/ranks.sh
started=$SECONDS
say() { printf '[%3d s] %s\n' "$((SECONDS - started))" "$*"; }

declare -A about=(
  [inputs]="writes texts, a tokenizer and a random model"
  [import]="imports the model" [data-raw]="tokenizes" [data-post]="tokenizes" [data-heldout]="tokenizes"
  [teacher-stage1]="trains the BF16 teacher on raw text" [teacher-stage2]="trains it on text in another style"
  [ptq]="quantizes the teacher to NVFP4, without training" [qat]="trains the quantized model on its task loss"
  [qad]="trains the quantized model with KL to the teacher"
  [validate]="checks the export" [report]="writes the run report"
)
# step NAME COMMAND...: runs one step of the example. Its output goes to a log, whose end is shown if it fails; of a training job the
# terminal gets one line every few iterations.
step() {
  local name=$1; shift
  say "$name${about[$name]:+: ${about[$name]}}"
  "$@" 2>&1 | tee "$out/log/$name.txt" | sed -un 's/^.* | \(iteration [^|]*\) | \([^|]*\) | grad norm.*| left: \(.*\)/        \1, \2, \3 left/p' || {
    tail -n 40 "$out/log/$name.txt"
    say "$name failed; complete log: $out/log/$name.txt"
    exit 1
  }
}

# Makes texts, tokenizer and an untrained model (make_inputs.py), tokenizes the texts, and imports the model as "untrained".
make_inputs() {
  local text
  step inputs python "$here/make_inputs.py" "$out/inputs"
  mkdir "$out/data"
  for text in raw post heldout; do
    step "data-$text" megatron-qad prepare --input "$out/inputs/$text.txt" --split-on $'\n\x1e\n' \
      --tokenizer "$out/inputs/hf/tokenizer.model" --output "$out/data/$text" &
  done
  step import megatron-qad import --hf-model "$out/inputs/hf" --output "$out/untrained"
  wait_all
}

# job COMMAND NAME FLAGS...: runs megatron-qad train or ptq with the settings of train.yaml.
job() {
  local command=$1 name=$2; shift 2
  NPROC_PER_NODE=$ranks step "$name" megatron-qad "$command" --config "$here/train.yaml" \
    --save "$out/$name" --tensorboard-dir "$out/$name/tensorboard" --valid-data-path "$out/data/heldout" "$@"
  grep -hE 'megatron_qad (validation|experts)' "$out/log/$name.txt" | tail -n 2 | sed 's/.*at iteration/        iteration/'
}
