# Jobs of an example that a second call skips; to be sourced with $out (output directory) set, and with a function job COMMAND FLAGS...
# that runs a job with the example's settings.
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
mkdir -p "$out/log"

# run_once NAME COMMAND...: runs a command, unless it has finished before. Its output goes to a log, whose end is shown if it fails.
run_once() {
  local name=$1; shift
  [ ! -e "$out/log/$name.done" ] || return 0
  echo "$(date +%H:%M:%S) $name"
  "$@" >"$out/log/$name.txt" 2>&1 || { tail -n 40 "$out/log/$name.txt"; echo "$name failed; complete log: $out/log/$name.txt"; exit 1; }
  touch "$out/log/$name.done"
}

# once NAME COMMAND FLAGS...: the same for a job.
once() { run_once "$1" job "${@:2}"; }
