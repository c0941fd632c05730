#!/usr/bin/env bash
# Makes .venv in the repository root and installs psvae_jax into it. Does
# nothing where that has been done for the present setup.py and constraints.txt.

set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash launch/setup.sh [EXTRAS]

Installs psvae_jax and its requirements, in the tested versions of
constraints.txt, into .venv. launch/local.sh and launch/test.sh call it.

  EXTRAS  none, or names of setup.py joined by commas: tpu, cuda, demo, test.
          Left out: cuda where nvidia-smi works, tpu on a Cloud TPU VM, else
          none.

Environment:
  PYTHON       interpreter (>= 3.11) to make .venv with
  PSVAE_EXTRA  EXTRAS to use where the argument is left out

Examples:
  bash launch/setup.sh
  bash launch/setup.sh test
  PYTHON=/opt/python3.12/bin/python3 bash launch/setup.sh cuda,demo
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    bash launch/setup.sh test      # a torch without the CUDA libraries
EOF
}

say() { echo "launch/setup.sh: $*" >&2; }

fail() {
  say "$@"
  exit 1
}

# Exits with 0 where $1 runs and can make a virtual environment of the right
# version. Version managers leave commands that exist and do not run.
is_suitable() {
  "$1" -c 'import ensurepip, sys, venv
sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.11" \
      "with the venv module. Point PYTHON at one, or unset it."
    echo "$PYTHON"
    return
  fi
  local name
  # 3.11 first: the versions in constraints.txt were tested most on it.
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if is_suitable "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python >= 3.11 with the venv module was found. Install one (on" \
    "Debian and Ubuntu: apt-get install python3.11 python3.11-venv), or name" \
    "one: PYTHON=/path/to/python3 bash launch/setup.sh"
}

# Google's PCI vendor id alone would also match the network card of its VMs.
has_tpu() {
  local device
  for device in /sys/bus/pci/devices/*; do
    [[ -r "$device/vendor" && "$(<"$device/vendor")" == 0x1ae0 ]] || continue
    case "$(<"$device/device")" in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

detect_extras() {
  if nvidia-smi >/dev/null 2>&1; then
    echo cuda
  elif has_tpu; then
    echo tpu
  else
    echo none
  fi
}

check_extras() {
  local name
  [[ "$1" != none ]] || return 0
  for name in ${1//,/ }; do
    case "$name" in
      tpu | cuda | demo | test) ;;
      *) fail "unknown extra '$name'. Choose from tpu, cuda, demo, test, or none." ;;
    esac
  done
}

# A broken .venv (interrupted when it was made, or its Python is gone) is made
# again; one that runs is kept whoever made it.
make_venv() {
  local base
  if ! "$venv/bin/python" -c "" >/dev/null 2>&1; then
    base=$(find_python)
    say "making .venv with $base ($("$base" --version))"
    "$base" -m venv --clear "$venv"
  elif ! is_suitable "$venv/bin/python"; then
    fail "$venv holds $("$venv/bin/python" --version), and psvae_jax needs" \
      "Python >= 3.11 with the venv module. Delete that folder and run this" \
      "again."
  fi
  # Missing in an interrupted .venv, and in one made by another tool.
  "$venv/bin/python" -c "import pip" 2>/dev/null ||
    "$venv/bin/python" -m ensurepip --upgrade >/dev/null
}

# Of everything that decides what an installation would do.
fingerprint() {
  "$venv/bin/python" - setup.py pyproject.toml constraints.txt <<'EOF'
import hashlib
import pathlib
import sys

digest = hashlib.sha256(f"{sys.version} {pathlib.Path.cwd()}".encode())
for name in sys.argv[1:]:
  digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
EOF
}

# Whether the core and every extra in $2 were installed as $1 describes.
is_installed() {
  local part stamp
  for part in $2; do
    stamp="$venv/psvae_jax-$part.stamp"
    [[ -f "$stamp" && "$(<"$stamp")" == "$1" ]] || return 1
  done
}

install() {
  local started=$SECONDS target=".[$1]" parts="core ${1//,/ }" quiet=1
  local wanted part
  if [[ "$1" == none ]]; then
    target=.
    parts=core
  fi
  wanted=$(fingerprint)
  if is_installed "$wanted" "$parts"; then
    return
  fi
  [[ ! -t 2 ]] || quiet=
  say "installing psvae_jax (extras: $1); the first time takes minutes"
  # Stamps are written last: after an interrupted installation there are none,
  # and the next call takes it up again.
  for part in $parts; do
    rm -f "$venv/psvae_jax-$part.stamp"
  done
  "$venv/bin/python" -m pip install ${quiet:+--quiet} \
    --disable-pip-version-check --constraint constraints.txt \
    --editable "$target" </dev/null >&2 ||
    fail "the installation failed (see above). Nothing needs to be cleaned" \
      "up: run the same command again once the cause is gone."
  for part in $parts; do
    echo "$wanted" >"$venv/psvae_jax-$part.stamp"
  done
  say "installed in $((SECONDS - started)) s"
}

main() {
  if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    return
  fi
  (($# <= 1)) || fail "at most one argument; see bash launch/setup.sh --help"
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  venv="$PWD/.venv"
  local extras="${1:-${PSVAE_EXTRA:-}}"
  if [[ -z "$extras" ]]; then
    extras=$(detect_extras)
  fi
  check_extras "$extras"
  # Two jobs started at once install one after the other.
  if command -v flock >/dev/null; then
    exec 9>>"$venv.lock"
    flock --nonblock 9 || {
      say "waiting for another installation into .venv to end"
      flock 9
    }
  fi
  make_venv
  install "$extras"
}

main "$@"
