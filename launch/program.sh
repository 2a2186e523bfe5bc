# Checks what every program needs, sets the environment, and finds the program. Sourced by torchrun.sh and srun.sh with the
# program as $1; sets launch (this directory) and program.
# shellcheck shell=bash

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v python >/dev/null; then
  echo "error: no program named python. Activate the virtual environment of tools/setup_env.sh, or add its bin to PATH." >&2
  exit 2
fi
if [[ $(ulimit -v) != unlimited && $(ulimit -v) -lt $((4 << 20)) ]]; then  # torch could not be imported
  echo "error: the limit of address space is $(ulimit -v) KiB (ulimit -v); torch and Megatron alone need $((4 << 20)). Raise it: ulimit -v unlimited." >&2
  exit 2
fi
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
# The program is searched for in the current directory, then in the project's.
program=$1
root=${launch%/*}
if [[ -d $root/megatron_qad ]]; then  # a checkout; the installed package contains launch/
  if [[ $program != -* && ! -e $program && -e $root/$program ]]; then program=$root/$program; fi
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # scripts in tools/ import megatron_qad
fi
