#!/usr/bin/env bash
# Sets up .venv with what the tests need, then runs them.

set -euo pipefail

usage() {
  cat <<'EOF'
Usage: bash launch/test.sh [FLAGS OF pytest]

Installs psvae_jax with its test requirements into .venv where that has not
been done, then runs python -m pytest in the repository root: quietly, and in
one process a core, four at most. Later flags win, so -n0 runs all tests in one
process. Tests marked `slow` are left out unless -m selects them.

The tests run on the CPU. The parity tests compare with torch, of which the
default package index may bring a CUDA build of several GB; see the last
example.

Environment:
  PYTHON            interpreter (>= 3.11) to make .venv with
  PSVAE_TEST_CACHE  folder for compiled programs in place of .pytest_cache;
                    "off" compiles everything anew

Examples:
  bash launch/test.sh
  bash launch/test.sh tests/models -k block
  bash launch/test.sh -n0 -x --pdb tests/test_losses.py
  bash launch/test.sh -m slow
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/test.sh
EOF
}

main() {
  if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    return
  fi
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  bash launch/setup.sh test
  # Most of the time is compilation, which one test file's cases share: a file
  # stays in one process.
  exec .venv/bin/python -m pytest -q -n logical --maxprocesses=4 \
    --dist=loadfile "$@"
}

main "$@"
