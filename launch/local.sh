#!/usr/bin/env bash
# Sets up .venv on this machine, then trains.

set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash launch/local.sh [FLAGS OF psvae_jax.main]

Installs psvae_jax into .venv where that has not been done, then runs
python -m psvae_jax.main with the flags given. Two flags have defaults:

  --config=configs/psvae.py  the job; a variant follows a colon
  --workdir=runs/NAME        where it writes; NAME is the config's name with
                             its variant (psvae, psvae-photos, ...)

A job that is run again with the same workdir resumes, and skips what is
finished. Relative paths in flags start at the repository root, wherever the
command is called from.

Environment:
  PYTHON       interpreter (>= 3.11) to make .venv with
  PSVAE_EXTRA  none, tpu or cuda, where the accelerator is not to be detected

Examples:
  bash launch/local.sh
  bash launch/local.sh --workdir=runs/short --config.svae.train.steps=100
  bash launch/local.sh --config=configs/psvae.py:bundled
  PSVAE_EXTRA=none bash launch/local.sh      # CPU, though there is a GPU
EOF
}

# configs/psvae.py:base,channels=32 -> psvae-base-channels=32
config_name() {
  local file="${1%%:*}" name
  name=$(basename "$file" .py)
  name="${name%.json}"
  [[ "$1" != *:?* ]] || name+="-${1#*:}"
  echo "${name//[^A-Za-z0-9._=-]/-}"
}

main() {
  local config="" workdir="" previous="" flag
  for flag in "$@"; do
    case "$flag" in
      -h | --help)
        usage
        return
        ;;
      --config=* | -config=*) config="${flag#*=}" ;;
      --workdir=* | -workdir=*)
        workdir="${flag#*=}"
        ;;
    esac
    case "$previous" in
      --config | -config) config="$flag" ;;
      --workdir | -workdir)
        workdir="$flag"
        ;;
    esac
    previous="$flag"
  done

  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  bash launch/setup.sh

  if [[ -z "$config" ]]; then
    config=configs/psvae.py
    set -- --config="$config" "$@"
  fi
  if [[ -z "$workdir" ]]; then
    workdir="runs/$(config_name "$config")"
    set -- "$@" --workdir="$workdir"
    echo "launch/local.sh: writing to $workdir (--workdir=DIR changes it)" >&2
  fi
  exec .venv/bin/python -m psvae_jax.main "$@"
}

main "$@"
