#!/usr/bin/env bash
# The whole workflow of a recipe on one node, from a Hugging Face model and text to a validated NVFP4 export and a report:
#   examples/recipes/run.sh examples/recipes/MODEL/8x80gb.yaml HF_DIR CHATS_OR_TEXT WORK [FLAGS...]
# It is `megatron-qad run` with the recipe's files. FLAGS are those of megatron-qad run and train, and override the recipe's. The
# same command again resumes. Recipes for several nodes run as SLURM jobs (README.md of this directory).
set -euo pipefail
if [[ $# -lt 4 ]]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit 2; fi
here=$(dirname "$0")
exec megatron-qad run --model "$2" --chats "$3" --output "$4" --config "$here/common.yaml" \
  --config "$(dirname "$1")/training.yaml" --config "$1" "${@:5}"
