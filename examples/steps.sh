# What the tiny examples share; sourced with $here (the example's folder) and $out (a new output directory) set.
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
if [ -e "$out" ]; then echo "$out exists; remove it or name another directory: $0 DIRECTORY" >&2; exit 1; fi
mkdir -p "$out/log"
source examples/ranks.sh
started=$SECONDS
say() { printf '[%3d s] %s\n' "$((SECONDS - started))" "$*"; }

# One step of the example: its name, then its command; what it prints goes to a log that is shown if it fails.
step() {
  local name=$1; shift
  say "$name"
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 40 "$out/log/$name.txt"; say "$name failed; all of it: $out/log/$name.txt"; exit 1; }
}

# Texts, tokenizer and an untrained model by make_inputs.py, tokens of each text, the model imported as "untrained".
make_inputs() {
  local text
  step inputs python "$here/make_inputs.py" "$out/inputs"
  mkdir "$out/data"
  for text in raw post heldout; do
    step "data-$text" python tools/prepare_data.py --input "$out/inputs/$text.txt" --split-on $'\n\x1e\n' \
      --tokenizer "$out/inputs/hf/tokenizer.model" --output "$out/data/$text" &
  done
  step import python tools/import_hf.py --hf-model "$out/inputs/hf" --output "$out/untrained"
  wait_all
}

# A training job (--save and the losses differ, the rest is in train.yaml).
train() {
  local name=$1; shift
  step "$name" torchrun --standalone --nproc-per-node "$ranks" pretrain_qad.py --config "$here/train.yaml" \
    --save "$out/$name" --tensorboard-dir "$out/$name/tensorboard" --valid-data-path "$out/data/heldout" "$@"
  grep -hE 'megatron_qad (validation|experts)' "$out/log/$name.txt" | tail -n 2 | sed 's/.*at iteration/        iteration/'
}
