# shellcheck shell=bash
# find_312: print a Python 3.12 that can make virtual environments. $PYTHON comes first, if it is set. To be sourced.

is_312() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_312() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3 python /usr/bin/python3.12 /usr/local/bin/python3.12 /opt/*/bin/python3.12 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3.12 \
    "$HOME"/*conda3/envs/*/bin/python3.12; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && is_312 "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 with venv found. Install one (apt install python3.12-venv, pyenv install 3.12, uv python install 3.12) or set PYTHON=/path/to/python3.12" >&2
  return 1
}
