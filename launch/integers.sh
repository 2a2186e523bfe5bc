# Checks numbers in variables and files that others wrote, before the shell calculates with them. To be sourced.
# slurm.sbatch has a copy of the function, because sbatch copies that script to a place where it finds no other file.
# shellcheck shell=bash

# integer NAME VALUE MINIMUM [MAXIMUM]: print the value of a variable or file as a whole number without leading zeros.
# Shell arithmetic evaluates its operands: the value 'a[$(command)]' would run the command, and 010 would be 8.
integer() {
  local maximum=${4:-999999999}
  if [[ ! $2 =~ ^[[:digit:]]{1,15}$ ]] || ((10#$2 < $3 || 10#$2 > maximum)); then
    printf 'error: %s=%q: expected a whole number from %d to %d.\n' "$1" "$2" "$3" "$maximum" >&2
    return 2
  fi
  echo "$((10#$2))"
}
