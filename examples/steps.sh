# Shared by the tiny examples; to be sourced with $here (folder of the example) and $out (a new output directory) set.
if [ -e "$out" ]; then echo "$out exists; remove it or name another directory: $0 DIRECTORY" >&2; exit 1; fi
source examples/chains.sh
mkdir -p "$out/data" "$out/records"
say() { printf '[%3d s] %s\n' "$((SECONDS - started))" "$*"; }

# step NAME ABOUT COMMAND...: runs a command. Its output goes to a log, whose end is shown if it fails.
step() {
  local name=$1; say "$name: $2"; shift 2
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 40 "$out/log/$name.txt"; say "$name failed; complete log: $out/log/$name.txt"; exit 1; }
}

# prepare_texts: writes texts, a tokenizer and an untrained model (make_inputs.py), and adds chains that tokenize and import them.
prepare_texts() {
  local text
  step inputs "writes texts, a tokenizer and a random model" python "$here/make_inputs.py" "$out/inputs"
  for text in raw post heldout; do
    job "data-$text" "data-$text" "tokenizes" prepare --input "$out/inputs/$text.txt" --split-on '\s\x1e\s' \
      --tokenizer "$out/inputs/hf/tokenizer.model" --output "$out/data/$text"
  done
  job import import "imports the model" import --hf-model "$out/inputs/hf" --output "$out/untrained"
}
