#!/usr/bin/env bash
# Create or reuse the environment of the serving engines (vLLM and llama.cpp on a CPU) and print its path.
# It is made from tests/serve/serving.lock alone and shared by all clones with the same lock.
#   XDG_CACHE_HOME=DIR  parent of the directory megatron_qad/serving-HASH (default: ~/.cache)
#   PYTHON=FILE         Python 3.12 to use (default: the first one found)
set -euo pipefail
cd "$(dirname "$0")/.."
lock=tests/serve/serving.lock
# shellcheck source=tools/find_python.sh
. tools/find_python.sh

hash=$(sha256sum "$lock")
venv=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_qad/serving-${hash:0:16}
complete=$venv/complete

# The stamp is written last, so an interrupted creation is never reused. The interpreter may be gone after an upgrade.
usable() { [ -f "$complete" ] && "$venv/bin/python" -c '' >/dev/null 2>&1; }

create() {
  local python
  if ! { [ "$(uname -sm)" = "Linux x86_64" ] && grep -qw avx2 /proc/cpuinfo; }; then
    echo "error: the serving environment needs Linux on an x86-64 CPU with AVX2 (found $(uname -sm)). Set QAD_NO_SERVE=1 to test without it." >&2
    return 1
  fi
  python=$(find_312)
  echo "setting up $venv with $("$python" --version) (takes minutes: torch and its CUDA libraries are about 5 GB)" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv"
  # --no-compile: few of the modules are ever imported, and Python compiles those then.
  "$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$lock" >&2
  "$venv/bin/python" -c 'import torch, vllm' >&2
  touch "$complete"
}

if ! usable; then
  mkdir -p "$(dirname "$venv")"
  # One process creates it; others wait here. The lock ends with the process.
  exec 9>"$venv.lock"
  flock 9
  if ! usable; then
    trap 'rm -rf "$venv"' EXIT # gives the disk space back after a failure
    create
    trap - EXIT
  fi
fi
echo "$venv"
